"Render the site into _docs with Quarto: python tools/render_site.py"
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.quarto import nbdev_docs

ROOT = Path(__file__).resolve().parent.parent
COPIED = dict(skip_file_re='^[.]')  # also names that begin with an underscore: nbs/experiments/_metadata.yml

if __name__ == '__main__':
    if not shutil.which('quarto'):  # nbdev would try to install it
        sys.exit('this needs Quarto 1.7 or newer: https://quarto.org')
    nbdev_docs.__wrapped__(**COPIED)
    subprocess.run([sys.executable, ROOT/'tools/readme.py'], check=True)  # nbdev's README has dead links
