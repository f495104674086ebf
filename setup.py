"Reads `settings.ini`, the one home of this package's metadata and requirements"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

root = Path(__file__).parent
ini = ConfigParser(delimiters=['=']); ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
extras = {k.removesuffix('_requirements'):v.split() for k,v in cfg.items() if k.endswith('_requirements')}

setup(version=cfg['version'], description=cfg['description'], author=cfg['author'], author_email=cfg['author_email'],
    license_expression=cfg['license'], keywords=cfg['keywords'].split(), python_requires='>='+cfg['min_python'],
    packages=find_packages(include=['cellseg','cellseg.*']), package_data={'cellseg':['*.js']}, install_requires=cfg['requirements'].split(), extras_require=extras,
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    entry_points={'console_scripts':['cellseg = cellseg.cli:main'], 'nbdev':['cellseg = cellseg._modidx:d']})
