"""Pages and pictures: report.html of one run or of several, the map of a data set, and the page of `watch`.

A run folder comes in. One self-contained HTML file goes out, which loads nothing from elsewhere.
"""
