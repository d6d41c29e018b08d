"""report.html: one file that shows a run, several runs, or a data set before any training. See write.py."""
