"agft installs from settings.ini, the file that nbdev reads too."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
STATUS = {'2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}
LICENSES = {'apache2': 'Apache-2.0'}  # as nbdev writes it -> SPDX expression

ini = ConfigParser(delimiters=['='])
ini.read(HERE/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']


def several(key):
    "The values of a setting that are separated by commas."
    return [value.strip() for value in cfg[key].split(',')]


def readme():
    "The README; relative links become links into the repository, as a package index shows it elsewhere."
    text = (HERE/'README.md').read_text(encoding='utf-8')
    base = f"{cfg['git_url']}/%s/{cfg['branch']}/"
    relative = r'\]\((?![a-z]+:|#)'
    text = re.sub('(!\\[[^\\]]*)'+relative, r'\1]('+base % 'raw', text)
    return re.sub(relative, ']('+base % 'blob', text)


def classifiers():
    "The trove classifiers. The licence has none: it is an expression (PEP 639)."
    return [
        f"Development Status :: {cfg['status']} - {STATUS[cfg['status']]}",
        *(f'Intended Audience :: {audience}' for audience in several('audience')),
        f"Natural Language :: {cfg['language']}",
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: {version}' for version in cfg['pythons'].split()),
        *(f'Topic :: {topic}' for topic in several('topics')),
        'Typing :: Typed',
    ]


setup(
    name=cfg['lib_name'], version=cfg['version'], description=cfg['description'], keywords=cfg['keywords'],
    author=cfg['author'], author_email=cfg['author_email'], url=cfg['git_url'],
    project_urls={
        'Documentation': cfg['doc_host']+cfg['doc_baseurl'],
        'Source': cfg['git_url'],
        'Changelog': f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
        'Issues': cfg['git_url']+'/issues',
    },
    license_expression=LICENSES[cfg['license']], license_files=['LICENSE'], classifiers=classifiers(),
    long_description=readme(), long_description_content_type='text/markdown',
    python_requires='>='+cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={k: cfg[f'{k}_requirements'].split() for k in ('dev', 'lora', 'data', 'cluster')},
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],  # links of names to pages and source
    },
    packages=find_packages(include=['agft', 'agft.*']),
    package_data={'agft': ['py.typed', 'assets/*', 'configs/*.json', 'presets/*.json']}, zip_safe=False)
