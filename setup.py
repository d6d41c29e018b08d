"""What goes into the wheel: the package, and within it the recipes, which lie beside it here."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fast_ft", "fast_ft.*"]), "fast_ft.recipes"],
    package_dir={"fast_ft.recipes": "recipes"},
    package_data={
        "fast_ft.doctor": ["measured.json"],
        "fast_ft.generate.engine": ["*.cu"],
        "fast_ft.plan": ["cards.json", "constants.json"],
        "fast_ft.pocket": ["*.json", "README.md", "base/*"],
        "fast_ft.report": ["static/*"],
        "fast_ft.recipes": ["*.yaml", "*/*"],
    },
)
