"agft installs from settings.ini, the file that nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'], license='Apache-2.0',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    python_requires='>='+cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'lora', 'data', 'cluster')},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    packages=find_packages(include=['agft', 'agft.*']),
    package_data={'agft': ['py.typed', 'assets/*', 'configs/*.json', 'presets/*.json']}, zip_safe=False)
