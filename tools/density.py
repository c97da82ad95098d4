"""How dense the package's code is: the figures that CONTRIBUTING.md limits.

    python tools/density.py            # prints a table; exit code 1 where a limit is passed

Counted in agft/*.py without comments, blank lines and the generated lists of names (`__all__`, `_modidx.py`).
"""
import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COUNTED = 'lines', 'subscripts', 'comprehensions', 'long_lines', 'long_functions'
LIMITS = dict(subscripts=2., comprehensions=3.5, long_lines=0, long_functions=0, home_names=40)
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp


def code(file):
    "A module's text without its generated list of names."
    return re.sub(r'^__all__ = \[.*?\]$', '', file.read_text(encoding='utf-8'), flags=re.S | re.M)


def is_string_subscript(node):
    "Whether a syntax node is like x['key']."
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Constant):
        return False
    return isinstance(node.slice.value, str)


def is_long_function(node):
    "Whether a syntax node is a function of more than 40 lines."
    if not isinstance(node, ast.FunctionDef):
        return False
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno >= 40


def counts(text):
    "Lines, string subscripts, comprehensions, lines over 110 characters, functions over 40 lines."
    lines = [line for line in text.split('\n') if line.strip() and not line.strip().startswith('#')]
    found = dict.fromkeys(COUNTED, 0)
    found['lines'] = len(lines)
    found['long_lines'] = sum(len(line) > 110 for line in lines)
    for node in ast.walk(ast.parse(text)):
        found['subscripts'] += is_string_subscript(node)
        found['comprehensions'] += isinstance(node, COMPREHENSIONS)
        found['long_functions'] += is_long_function(node)
    return found


def home_names(modules):
    "Public functions and classes that only their own chapter uses: no other module, page, test or benchmark."
    others = [ROOT/'agft/__init__.py']
    for pattern in ('nbs/**/*.ipynb', 'tests/*.py', 'benchmarks/*.py'):
        others += ROOT.glob(pattern)
    texts = {file: file.read_text(encoding='utf-8') for file in [*modules, *others]}
    found = []
    for file in modules:
        chapter = re.compile(rf'(\d\d_)?{file.stem}')
        outside = [text for other, text in texts.items() if not chapter.fullmatch(other.stem)]
        for node in ast.parse(texts[file]).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith('_'):
                continue
            used = re.compile(rf'\b{node.name}\b')
            if not any(used.search(text) for text in outside):
                found.append(f'{file.stem}.{node.name}')
    return found


def main():
    modules = [file for file in sorted((ROOT/'agft').glob('*.py')) if file.stem[0] != '_']
    total = dict.fromkeys(COUNTED, 0)
    for file in modules:
        for key, value in counts(code(file)).items():
            total[key] += value
    home = home_names(modules)
    figures = {key: 100*total[key]/total['lines'] for key in ('subscripts', 'comprehensions')}
    figures |= {key: total[key] for key in ('long_lines', 'long_functions')}
    figures['home_names'] = len(home)
    print(f'{total["lines"]} lines in {len(modules)} modules')
    for key, value in figures.items():
        print(f'{key:16}{value:8.2f}   limit {LIMITS[key]}')
    print('public names that only their own chapter uses:', ', '.join(home))
    return int(any(value > LIMITS[key] for key, value in figures.items()))


if __name__ == '__main__':
    sys.exit(main())
