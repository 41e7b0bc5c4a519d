"""Package metadata comes from settings.ini, the file nbdev reads."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="])
ini.read(HERE / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

extras = {key.removesuffix("_requirements"): shlex.split(cfg[key]) for key in cfg if key.endswith("_requirements")}
extras["all"] = sorted({r for name, rs in extras.items() if name != "dev" for r in rs})

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license=cfg["license"].upper(), keywords=cfg["keywords"].split(),
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["data/**/*", "py.typed"]},
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": [line.strip() for line in cfg["console_scripts"].splitlines() if line.strip()]},
    zip_safe=False,
)
