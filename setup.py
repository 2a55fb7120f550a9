"""Install spml_kit as settings.ini describes it; the experiment notebooks travel as package data."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lines = lambda key: [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    license="Apache-2.0",
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["spml_kit", "spml_kit.*"]) + ["spml_kit.experiments"],
    package_dir={"spml_kit": "spml_kit", "spml_kit.experiments": "nbs/experiments"},
    package_data={"spml_kit.experiments": ["*.ipynb", "*.yaml", "grids/*.yaml"], "spml_kit.look": ["static/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["spml_kit=spml_kit._modidx:d"]},
    zip_safe=False,
)
