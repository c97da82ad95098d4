"The book: every notebook has the form that CONTRIBUTING.md describes, every link leads somewhere, and the README is what its notebook says."
import ast, base64, importlib.util, json, re
from configparser import ConfigParser
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK = sorted(p.relative_to(ROOT) for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))
PAGES = [Path(p) for p in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md')]
MODULES = sorted((ROOT/'agft').glob('*.py'))
each_notebook = pytest.mark.parametrize('nb', BOOK, ids=lambda p: p.stem)

def cells(nb): return [(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in json.loads((ROOT/nb).read_text(encoding='utf-8'))['cells']]
def text_of(outputs): return '\n'.join(''.join(t) for o in outputs for t in [o.get('text', ''), *(v for k,v in o.get('data', {}).items() if k.startswith('text'))])

def test_readme_is_made_from_the_index():
    spec = importlib.util.spec_from_file_location('readme', ROOT/'tools/readme.py'); tool = importlib.util.module_from_spec(spec); spec.loader.exec_module(tool)
    assert (ROOT/'README.md').read_text(encoding='utf-8')==tool.readme(), 'run python tools/readme.py'
    assert tool.from_root('[a](b.ipynb#c) [d](../e) [f](https://g.h) [i](#j)')=='[a](nbs/b.ipynb#c) [d](e) [f](https://g.h) [i](#j)'

@each_notebook
def test_begins_with_title_and_summary(nb):
    kind,text,_ = cells(nb)[0]
    lines = [l for l in text.splitlines() if l.strip()]
    assert kind=='markdown' and lines[0].startswith('# ') and lines[1].startswith('> ') and sum(l.startswith('> ') for l in lines)==1

@each_notebook
def test_links_lead_somewhere(nb):
    for kind,text,_ in cells(nb):
        for link in re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', text if kind=='markdown' else ''): assert (ROOT/nb.parent/link).exists(), link

@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_of_pages_lead_somewhere(page):
    for link in re.findall(r'\]\((?![a-z]+:|#)([^)#\s]+)', (ROOT/page).read_text(encoding='utf-8')): assert (ROOT/link).exists(), link

@each_notebook
def test_figures_are_small_and_have_captions(nb):
    book = [c for c in cells(nb) if not c[1].startswith('#| hide')]
    for (_,source,outputs),(kind,text,_) in zip(book, book[1:]+[('', '', [])]):
        pngs = [o['data']['image/png'] for o in outputs if 'image/png' in o.get('data', {})]
        if pngs: assert kind=='markdown' and re.match(r'[*_]\S', text), f'no caption in italics under the figure of: {source[-120:]}'
        for png in pngs: assert len(base64.b64decode(''.join(png)))<100_000, source[-120:]

@each_notebook
def test_no_cell_failed_or_warned(nb):
    for _,source,outputs in cells(nb):
        assert not [o for o in outputs if o['output_type']=='error'], source
        assert 'Warning' not in text_of(outputs), source

@each_notebook
def test_flags_only_on_cells_that_are_not_exported(nb):
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini')
    for _,source,_ in cells(nb):
        marks = set(re.findall(r'^#\|\s*(\w+)', source, re.M))
        assert not (marks & {'export', 'exports', 'exporti'} and marks & set(ini['DEFAULT']['tst_flags'].split())), source

@pytest.mark.parametrize('nb', [b for b in BOOK if b.stem!='index'], ids=lambda p: p.stem)
def test_imports_have_cells_of_their_own(nb):
    "nbdev executes every cell with an import when it makes the site, and the cells that such a cell builds on it does not."
    for kind,source,_ in cells(nb):
        if kind!='code' or re.match(r'#\|\s*export', source): continue
        nodes = [n for n in ast.parse(re.sub(r'^\s*[%!].*$', '', source, flags=re.M)).body if ast.unparse(n)!='style()']
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes]
        assert all(imports) or not any(imports), source[:200]

MACHINE = re.compile(r'(?<![\w.~/])/(home|root|work|opt|tmp|usr|Users|mnt|content)/\w')

def test_no_path_of_a_machine():
    assert MACHINE.search("in '/home/me/x'") and not MACHINE.search('https://a.b/home/x')
    for nb in BOOK:
        for _,source,outputs in cells(nb): assert not (m := MACHINE.search(source+'\n'+text_of(outputs))), f'{nb}: {m}'
    for f in [*MODULES, *(ROOT/p for p in PAGES), *(ROOT/'results').glob('*.json')]: assert not (m := MACHINE.search(f.read_text(encoding='utf-8'))), f'{f.name}: {m}'

def leaves(node):
    "Every path in the site's sidebar and navigation."
    if isinstance(node, str): return [node]
    if isinstance(node, list): return [l for n in node for l in leaves(n)]
    return leaves(node.get('contents', []))+leaves(node.get('href', []))

def test_site_lists_every_notebook_and_nothing_else():
    site = yaml.safe_load((ROOT/'_quarto.yml').read_text())
    listed = leaves(site['website']['sidebar'])
    assert sorted(listed)==sorted(p.relative_to('nbs').as_posix() for p in BOOK)
    assert set(leaves(site['website']['navbar']['left'])) <= set(listed)
    numbers = [l for l in listed if re.match(r'\d\d_', l)]
    assert numbers==sorted(numbers)
    for f in (site['format']['html']['css'], *site['metadata-files']): assert (ROOT/'nbs'/f).is_file(), f

def test_site_and_settings_agree():
    link = ROOT/'nbs/_quarto.yml'
    assert link.is_symlink() and link.readlink()==Path('../_quarto.yml')
    ini = ConfigParser(delimiters=['=']); ini.read(ROOT/'settings.ini'); cfg,site = ini['DEFAULT'], yaml.safe_load((ROOT/'nbs/nbdev.yml').read_text())['website']
    assert (site['title'], site['description'], site['repo-url'])==(cfg['title'], cfg['description'], cfg['git_url'])
    assert f'__version__ = "{cfg["version"]}"' in (ROOT/'agft/__init__.py').read_text()
    assert f'## {cfg["version"]}' in (ROOT/'CHANGELOG.md').read_text()

@each_notebook
def test_exported_names_are_documented_and_lines_are_short(nb):
    for _,source,_ in cells(nb):
        if not re.match(r'#\|\s*export', source): continue
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0]!='_': assert ast.get_docstring(node), f'{node.name} has no docstring'
        for line in source.splitlines(): assert len(line)<=140, f'{len(line)} characters: {line}'
