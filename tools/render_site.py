"Render the site into _docs with Quarto: python tools/render_site.py"
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
LONG = 25  # lines of exported code that are shown unfolded
EXPORTED = re.compile(r'#\| code-fold: show\n#\| code-summary: .*\n')  # what nbdev writes above exported code


def defined(code):
    "The names that a cell defines: functions, classes and their methods."
    for node in ast.parse(code).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f'{node.name}.{part.name}' for part in node.body if isinstance(part, ast.FunctionDef))


def with_anchors(cell):
    "A cell; above exported code stand the anchors that nbdev links to, and long code is folded."
    code = EXPORTED.sub('', cell.source)
    if cell.cell_type != 'code' or code == cell.source:
        return [cell]
    names = [*defined(code)]
    if code.count('\n') >= LONG:
        public = [name for name in names if not name.startswith('_') and '.' not in name]
        summary = f'Source: {", ".join(public)}' if public else 'Source'
        cell.source = f'#| code-fold: true\n#| code-summary: "{summary}"\n{code}'
    anchors = ' '.join(f'[]{{#{name.lower()}}}' for name in names)
    return [nbformat.v4.new_markdown_cell(anchors), cell] if names else [cell]


def process():
    "The folder in which nbdev has prepared the notebooks for Quarto."
    # also names that begin with an underscore, which nbdev leaves out: nbs/experiments/_metadata.yml
    pages = proc_nbs(n_workers=0, force=True, skip_file_re='^[.]')
    for path in pages.rglob('*.ipynb'):
        nb = nbformat.read(path, 4)
        nb.cells = [shown for cell in nb.cells for shown in with_anchors(cell)]
        nbformat.write(nb, path)
    return pages


def main():
    if not shutil.which('quarto'):  # nbdev would try to install it
        sys.exit('this needs Quarto 1.7 or newer: https://quarto.org')
    refresh_quarto_yml()
    pages = process()
    subprocess.run(['quarto', 'render', '--no-cache'], cwd=pages, check=True)
    shutil.rmtree(ROOT/'_docs', ignore_errors=True)
    shutil.move(pages/'_docs', ROOT/'_docs')


if __name__ == '__main__':
    main()
