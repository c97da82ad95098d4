"The wheel, the order of the chapters, and an import that must work beside any torchvision."
import ast, json, os, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = {p.stem[3:]: int(p.stem[:2]) for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))} # module -> number
DATA = sorted(str(p.relative_to(ROOT)) for d in ('assets', 'configs', 'presets') for p in (ROOT/'agft'/d).glob('*') if p.name[0] not in '._')

def run(code, *, path=(), cwd=None, ok=True):
    "Run Python `code` in a process of its own, with `path` before everything else."
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, path)), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], env=env, cwd=cwd, capture_output=True, text=True)
    assert (done.returncode==0)==ok, done.stderr
    return done.stdout.strip() if ok else done.stderr

# -- the wheel

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy, so that no old build folder can slip in."
    tmp = tmp_path_factory.mktemp('wheel')
    shutil.copytree(ROOT/'agft', tmp/'src'/'agft', ignore=shutil.ignore_patterns('__pycache__'))
    for f in ('setup.py', 'settings.ini', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CONTRIBUTING.md'): shutil.copy(ROOT/f, tmp/'src')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp/'out', tmp/'src'], check=True, stdin=subprocess.DEVNULL)
    built, = (tmp/'out').glob('*.whl')
    return built

def test_wheel_carries_every_module_and_data_file(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {f'agft/{m}.py' for m in CHAPTERS} <= held
    assert DATA and set(DATA) <= held
    assert not [f for f in held if f.startswith(('nbs/', 'tests/', 'tools/'))]

def test_wheel_says_what_settings_say(wheel):
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini'); cfg = ini['DEFAULT']
    z = zipfile.ZipFile(wheel)
    meta,entry = (z.read(next(n for n in z.namelist() if n.endswith(e))).decode() for e in ('/METADATA', '/entry_points.txt'))
    assert f"Version: {cfg['version']}\n" in meta and f"Requires-Python: >={cfg['min_python']}" in meta
    assert len(re.findall(r'^Requires-Dist: (?!.*extra ==)', meta, re.M))==len(cfg['requirements'].split())
    assert len(re.findall(r'^Requires-Dist: .*extra == .dev.', meta, re.M))==len(cfg['dev_requirements'].split())
    assert 'agft = agft.cli:main' in entry
    assert any(n.endswith('LICENSE') for n in z.namelist())

def test_installed_elsewhere_it_finds_its_files(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path/'site')
    code = 'import agft; from agft.core import asset, load_preset; from pathlib import Path; print(agft.__file__)'
    code += ''.join(f'; assert asset({Path(f).name!r}).is_file()' for f in DATA if '/assets/' in f)
    code += ''.join(f'; assert load_preset({Path(f).stem!r})' for f in DATA if '/presets/' in f)
    assert run(code, path=[tmp_path/'site'], cwd=tmp_path)==str(tmp_path/'site'/'agft'/'__init__.py')
    work = "from agft.cli import main; assert main(['eval', 'agft-tiny', '--n', '4', '--out', 'e'])==0"
    assert 'zero-shot mean' in run(work, path=[tmp_path/'site'], cwd=tmp_path)

# -- the order of the chapters

def imported(source):
    "The agft modules that Python `source` imports, at the top or inside functions."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name.split('.')[1] for a in node.names if a.name.startswith('agft.')}
        if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('agft.'): found.add(node.module.split('.')[1])
        if isinstance(node, ast.ImportFrom) and node.level and node.module: found.add(node.module.split('.')[0])
        if isinstance(node, ast.ImportFrom) and (node.module=='agft' or node.level and not node.module): found |= {a.name for a in node.names}
    return {m for m in found if not m.startswith('__')}

def cells(nb):
    "Python of a notebook's code cells, without magics."
    return '\n'.join(re.sub(r'^\s*[%!].*$', '', ''.join(c['source']), flags=re.M) for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='code')

def test_imported_sees_every_form():
    assert imported('import agft.clip as c\nfrom agft.core import x\ndef f():\n  from agft import show\nfrom .data import y\nfrom . import __version__\nimport torch')=={'clip','core','show','data'}

@pytest.mark.parametrize('name', CHAPTERS)
def test_chapter_imports_only_lower_numbers(name):
    for source in ((ROOT/'agft'/f'{name}.py').read_text(), cells(ROOT/'nbs'/f'{CHAPTERS[name]:02}_{name}.ipynb')):
        wrong = {m for m in imported(source)-{name} if CHAPTERS.get(m, 99)>=CHAPTERS[name]}
        assert not wrong, f'{name} ({CHAPTERS[name]}) imports {wrong}'

def test_attack_and_align_know_neither_models_nor_data():
    for name in ('attack', 'align'): assert not imported((ROOT/'agft'/f'{name}.py').read_text()) & {'clip', 'data', 'world'}
    assert run("import sys, agft.attack, agft.align; print(sorted({'agft.clip', 'agft.data', 'open_clip'} & set(sys.modules)))")=='[]'

def test_modules_and_chapters_are_the_same():
    assert {p.stem for p in (ROOT/'agft').glob('[!_]*.py')}==set(CHAPTERS) >= {'core', 'show'}

# -- torchvision

def fake_torchvision(folder, body):
    (folder/'torchvision').mkdir(); (folder/'torchvision'/'__init__.py').write_text(f'import torch\n{body}\n')

def test_import_beside_a_torchvision_without_its_library(tmp_path):
    fake_torchvision(tmp_path, "for op in ('nms', 'qnms'):\n    torch.library.register_fake('torchvision::'+op)(lambda d, s, t: d)")
    assert 'torchvision::nms does not exist' in run('import torchvision', path=[tmp_path], ok=False)
    assert run('import agft, torchvision, torch; print(torch.ops.torchvision.nms, torch.ops.torchvision.qnms)', path=[tmp_path, ROOT])

def test_import_leaves_a_working_torchvision_alone(tmp_path):
    fake_torchvision(tmp_path, "lib = torch.library.Library('torchvision', 'DEF'); lib.define('nms(Tensor a) -> Tensor')")
    assert run("import agft, torch; print(torch.ops.torchvision.nms.default._schema, hasattr(torch.ops.torchvision, 'qnms'))",
               path=[tmp_path, ROOT])=='torchvision::nms(Tensor a) -> Tensor False'

def test_other_failures_of_torchvision_stay_visible(tmp_path):
    fake_torchvision(tmp_path, "raise RuntimeError('no space left on device')")
    assert 'no space left on device' in run('import agft', path=[tmp_path, ROOT], ok=False)


@pytest.mark.parametrize('name', sorted(p.name for p in (ROOT/'benchmarks').glob('*.py')))
def test_benchmarks_find_what_they_import(name):
    done = subprocess.run([sys.executable, ROOT/'benchmarks'/name, '--help'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
