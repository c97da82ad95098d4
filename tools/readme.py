"Make README.md from nbs/index.ipynb where Quarto is absent: python tools/readme.py"
import base64
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\()(?![a-z]+:|#|/)([^)#\s]+)') # a relative link in Markdown, up to its fragment
ALT = re.compile(r'^#\|\s*fig-alt:\s*"?(.*?)"?\s*$', re.M) # the alt text of a cell's figure

def from_root(text:str)->str:
    "Links are relative to nbs/ in the notebook, and to the top folder in the README."
    return LINK.sub(lambda m: m[1]+posixpath.normpath('nbs/'+m[2]), text)

def output(o:dict, stem:str, alt:str)->str:
    "One stored output: an image becomes a file under nbs/images, Markdown stays, text is fenced."
    data = o.get('data', {})
    if 'image/png' in data:
        (ROOT/'nbs/images').mkdir(exist_ok=True)
        (ROOT/f'nbs/images/{stem}.png').write_bytes(base64.b64decode(''.join(data['image/png'])))
        return f'![{alt}](nbs/images/{stem}.png)'
    if 'text/markdown' in data:
        return from_root(''.join(data['text/markdown']))
    return '```\n'+''.join(data.get('text/plain', o.get('text', ''))).strip('\n')+'\n```'

def readme()->str:
    "The README as text: Markdown cells, code without its directives, and stored outputs."
    parts = ['<!-- made from nbs/index.ipynb by tools/readme.py: edit the notebook -->']
    for c in json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']:
        lines = ''.join(c['source']).splitlines()
        if c['cell_type']=='markdown':
            parts.append(from_root('\n'.join(lines)))
        if c['cell_type']!='code' or any(line.startswith('#| hide') for line in lines):
            continue
        code = '\n'.join(line for line in lines if not line.startswith('#|')).strip()
        if code and not any(line.startswith('#| echo: false') for line in lines):
            parts.append(f'```python\n{code}\n```')
        found = ALT.search('\n'.join(lines))
        alt = found[1] if found else ''
        parts += [output(o, f'readme-{c["id"]}-{j}', alt) for j,o in enumerate(c['outputs'])]
    return '\n\n'.join(p for p in parts if p)+'\n'

if __name__=='__main__':
    (ROOT/'README.md').write_text(readme(), encoding='utf-8')
