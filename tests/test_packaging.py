"What is published, the order of the chapters, and an import that must work beside any torchvision."
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))
CHAPTERS = {p.stem[3:]: int(p.stem[:2]) for p in NOTEBOOKS} # module -> number
FOLDERS = 'assets', 'configs', 'presets'
SOURCES = ('setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md',
           'CITATION.cff', 'CONTRIBUTING.md', 'SECURITY.md')
DATA = sorted(str(p.relative_to(ROOT)) for d in FOLDERS for p in (ROOT/'agft'/d).glob('[!._]*'))
CODE = sorted(str(p.relative_to(ROOT)) for p in (ROOT/'agft').glob('*.py'))

def settings():
    "The section of settings.ini."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def run(code, *, path=(), cwd=None, ok=True):
    "Run Python `code` in a process of its own, with `path` before everything else."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, path)), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=cwd, capture_output=True, text=True)
    assert (done.returncode==0)==ok, done.stderr
    return done.stdout.strip() if ok else done.stderr

# -- what is published

@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    "A source distribution, built from a copy, so that no old build folder can slip in."
    tmp = tmp_path_factory.mktemp('sdist')
    for folder in ('agft', 'tests'):
        shutil.copytree(ROOT/folder, tmp/'src'/folder, ignore=shutil.ignore_patterns('__pycache__'))
    for file in SOURCES:
        shutil.copy(ROOT/file, tmp/'src')
    build = [sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp/'out']
    subprocess.run(build, check=True, cwd=tmp/'src', stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    built, = (tmp/'out').glob('*.tar.gz')
    return built

@pytest.fixture(scope='module')
def wheel(sdist):
    "A wheel built from the sdist, as a package index gets it."
    build = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation',
             '-w', sdist.parent, sdist]
    subprocess.run(build, check=True, stdin=subprocess.DEVNULL)
    built, = sdist.parent.glob('*.whl')
    return built

def read(wheel, ending):
    "The text of the wheel's file whose name ends like this."
    z = zipfile.ZipFile(wheel)
    return z.read(next(name for name in z.namelist() if name.endswith(ending))).decode()

def test_wheel_holds_the_package_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith('/')}
    assert {f'agft/{m}.py' for m in CHAPTERS} <= set(CODE) and DATA
    about = f'agft-{settings()["version"]}.dist-info/'
    made = {'METADATA', 'RECORD', 'WHEEL', 'entry_points.txt', 'top_level.txt', 'licenses/LICENSE'}
    assert held == {*CODE, *DATA, 'agft/py.typed', *(about+name for name in made)}

def test_sdist_holds_the_package_and_what_builds_it_but_no_tests(sdist):
    with tarfile.open(sdist) as tar:
        names = [member.name.split('/', 1)[-1] for member in tar.getmembers() if member.isfile()]
    held = {name for name in names if not name.startswith('agft.egg-info/')}
    assert held == {*CODE, *DATA, *SOURCES, 'agft/py.typed', 'PKG-INFO', 'setup.cfg'}

def test_a_package_index_accepts_both(sdist, wheel):
    check = [sys.executable, '-m', 'twine', 'check', '--strict', sdist, wheel]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

def test_wheel_says_what_settings_say(wheel):
    cfg, meta, entry = settings(), read(wheel, '/METADATA'), read(wheel, '/entry_points.txt')
    assert f"Version: {cfg['version']}\n" in meta and f"Requires-Python: >={cfg['min_python']}" in meta
    needed = re.findall(r'^Requires-Dist: (?!.*extra ==)', meta, re.M)
    assert len(needed) == len(cfg['requirements'].split())
    for_work = re.findall(r'^Requires-Dist: .*extra == .dev.', meta, re.M)
    assert len(for_work) == len(cfg['dev_requirements'].split())
    assert 'agft = agft.cli:run' in entry
    assert 'License-Expression: Apache-2.0\n' in meta and 'License ::' not in meta
    versions = re.findall(r'^Classifier: Programming Language :: Python :: (3\.\d+)$', meta, re.M)
    assert versions == cfg['pythons'].split() and versions[0] == cfg['min_python']
    urls = dict(re.findall(r'^Project-URL: (\w+), (\S+)$', meta, re.M))
    assert set(urls) == {'Documentation', 'Source', 'Changelog', 'Issues'}
    assert urls['Source'] == cfg['git_url'] and urls['Documentation'] == cfg['doc_host']+cfg['doc_baseurl']

def test_links_of_the_long_description_are_whole(wheel):
    text = read(wheel, '/METADATA')
    assert f"]({settings()['git_url']}/blob/main/nbs/25_api.ipynb)" in text
    assert not re.findall(r'\]\((?!https?:|#)[^)]*\)', text)

LOOK_UP = """from nbdev.doclinks import NbdevLookup
names = NbdevLookup(strip_libs='agft')
print(names.doc('pgd'), names.code('pgd'), names.linkify('`Threat`'))"""

def test_names_lead_to_their_pages_and_source(wheel, tmp_path):
    "nbdev finds the index of names through the entry point."
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    page, source, link = run(LOOK_UP, path=[tmp_path/'site'], cwd=tmp_path).split()
    site, repo = settings()['doc_host']+settings()['doc_baseurl'], settings()['git_url']
    assert page == f'{site}/attack.html#pgd' and source.startswith(f'{repo}/blob/main/agft/attack.py#L')
    assert link == f'[`Threat`]({site}/threats.html#threat)'

# -- requirements

OPTIONAL = {'transformers', 'peft', 'h5py', 'dask', 'nltk', 'IPython'}  # an error says how to install them
NAMES = {'PIL': 'pillow', 'sklearn': 'scikit-learn', 'open_clip': 'open-clip-torch',
         'cycler': 'matplotlib', 'markupsafe': 'jinja2'}  # import -> the requirement that brings it

def normal(name):
    "A package's name as indexes compare it."
    return re.sub('[-_.]+', '-', name).lower()

def requirements(key='requirements'):
    "The requirements of settings.ini, by normalised name."
    parsed = [Requirement(text) for text in settings()[key].split()]
    return {normal(requirement.name): requirement for requirement in parsed}

def test_every_requirement_has_a_lower_bound():
    for name, requirement in requirements().items():
        assert {part.operator for part in requirement.specifier} & {'>=', '=='}, name
    for name in ('torch', 'torchvision'):
        assert {part.operator for part in requirements()[name].specifier} == {'>='}

def test_every_import_is_a_requirement():
    found = set()
    for file in CODE:
        for node in ast.walk(ast.parse((ROOT/file).read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split('.')[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split('.')[0])
    found -= {*sys.stdlib_module_names, 'agft', *OPTIONAL}
    packages = {normal(NAMES.get(name, name)) for name in found}
    assert packages <= set(requirements()), packages - set(requirements())

def test_installed_elsewhere_it_finds_its_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    lines = ['import agft', 'from agft.config import load_preset', 'from agft.core import asset']
    lines += [f'assert asset({Path(f).name!r}).is_file()' for f in DATA if '/assets/' in f]
    lines += [f'assert load_preset({Path(f).stem!r})' for f in DATA if '/presets/' in f]
    code = '\n'.join([*lines, 'print(agft.__file__)'])
    assert run(code, path=[tmp_path/'site'], cwd=tmp_path)==str(tmp_path/'site'/'agft'/'__init__.py')
    work = "from agft.cli import main; assert main(['eval', 'agft-tiny', '--n', '4', '--out', 'e'])==0"
    assert 'zero-shot mean' in run(work, path=[tmp_path/'site'], cwd=tmp_path)

# -- the order of the chapters

def imported(source):
    "The agft modules that Python `source` imports, at the top or inside functions."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('agft.')}
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ''
        if module.startswith('agft.'):
            found.add(module.split('.')[1])
        elif node.level and module:
            found.add(module.split('.')[0])
        elif module == 'agft' or node.level:
            found |= {a.name for a in node.names}
    return {m for m in found if not m.startswith('__')}

def cells(nb):
    "Python of a notebook's code cells, without magics."
    sources = [''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'code']
    return '\n'.join(re.sub(r'^\s*[%!].*$', '', source, flags=re.M) for source in sources)

EVERY_FORM = """import agft.model as c
from agft.core import x
def f():
  from agft import plots
from .data import y
from . import __version__
import torch"""

def test_imported_sees_every_form():
    assert imported(EVERY_FORM) == {'model', 'core', 'plots', 'data'}

@pytest.mark.parametrize('name', CHAPTERS)
def test_chapter_imports_only_lower_numbers(name):
    number = CHAPTERS[name]
    module = (ROOT/'agft'/f'{name}.py').read_text()
    for source in (module, cells(ROOT/'nbs'/f'{number:02}_{name}.ipynb')):
        wrong = {m for m in imported(source) - {name} if CHAPTERS.get(m, 99) >= number}
        assert not wrong, f'{name} ({number}) imports {wrong}'

def test_attack_knows_neither_models_nor_data():
    assert not imported((ROOT/'agft'/'attack.py').read_text()) & {'model', 'weights', 'data', 'world'}
    known = "print(sorted({'agft.model', 'agft.data', 'open_clip'} & set(sys.modules)))"
    assert run(f'import sys, agft.attack; {known}') == '[]'

HEAVY = {'scipy', 'sklearn', 'pandas', 'matplotlib', 'torchmetrics', 'torchattacks', 'pyautoattack',
         'datasets', 'peft', 'h5py'}  # transformers is imported by open_clip where it is installed

def test_worker_processes_import_only_what_they_use():
    "The modules of the benchmark's jobs: training, evaluation, search."
    chapters = 'agft.train, agft.evaluation, agft.search, agft.bench'
    code = f'import sys, {chapters}; print(sorted({HEAVY!r} & set(sys.modules)))'
    assert run(code) == '[]'

def test_modules_and_chapters_are_the_same():
    assert {p.stem for p in (ROOT/'agft').glob('[!_]*.py')}==set(CHAPTERS) >= {'core', 'plots'}

# -- torchvision

def fake_torchvision(folder, body):
    (folder/'torchvision').mkdir()
    (folder/'torchvision'/'__init__.py').write_text(f'import torch\n{body}\n')

OPS = 'print(torch.ops.torchvision.nms, torch.ops.torchvision.qnms)'
LOAD = 'from agft.core import import_torchvision; import_torchvision()'

def test_import_beside_a_torchvision_without_its_library(tmp_path):
    fake_torchvision(tmp_path, "for op in ('nms', 'qnms'):\n"
                     "    torch.library.register_fake('torchvision::'+op)(lambda d, s, t: d)")
    assert 'torchvision::nms does not exist' in run('import torchvision', path=[tmp_path], ok=False)
    assert run(f'{LOAD}; import torchvision, torch; {OPS}', path=[tmp_path, ROOT])

def test_import_leaves_a_working_torchvision_alone(tmp_path):
    fake_torchvision(tmp_path, "lib = torch.library.Library('torchvision', 'DEF')\n"
                     "lib.define('nms(Tensor a) -> Tensor')")
    code = (f"{LOAD}; import torch; "
            "print(torch.ops.torchvision.nms.default._schema, hasattr(torch.ops.torchvision, 'qnms'))")
    assert run(code, path=[tmp_path, ROOT]) == 'torchvision::nms(Tensor a) -> Tensor False'

def test_other_failures_of_torchvision_stay_visible(tmp_path):
    fake_torchvision(tmp_path, "raise RuntimeError('no space left on device')")
    assert 'no space left on device' in run(LOAD, path=[tmp_path, ROOT], ok=False)


HELP_OF_ALL = """
import pathlib, runpy, sys
for path in sorted(pathlib.Path('.').glob('*.py')):
    sys.argv = [path.name, '--help']
    try:
        runpy.run_path(str(path), run_name='__main__')
    except SystemExit as end:
        assert not end.code, path
"""

def test_benchmarks_find_what_they_import():
    env = dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT/"benchmarks"}')
    line = [sys.executable, '-c', HELP_OF_ALL]
    done = subprocess.run(line, cwd=ROOT/'benchmarks', env=env, capture_output=True, text=True)
    assert done.returncode == 0 and 'Wrong, rare and few labels' in done.stdout, done.stderr
