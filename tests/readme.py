"README.md is made from nbs/index.ipynb: `python tests/readme.py` writes it, `test_packaging.py` holds them equal"
from pathlib import Path
from fastcore.nbio import read_nb

root = Path(__file__).parents[1]

def render(nb) -> str:
    "Markdown of a notebook: its text, and its code without nbdev's directives"
    parts = []
    for c in nb.cells:
        if c.cell_type=='markdown': parts.append(c.source)
        else: parts.append('```python\n' + '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|')) + '\n```')
    return '\n\n'.join(p.strip() for p in parts).replace('](images/', '](nbs/images/') + '\n'

if __name__=='__main__': (root/'README.md').write_text(render(read_nb(root/'nbs'/'index.ipynb')), encoding='utf-8')
