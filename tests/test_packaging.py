"The package as a whole: one home for the version, layers, README, what an import costs"
import ast, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest
from fastcore.nbio import read_nb
import cellseg
from readme import render

root = Path(__file__).parents[1]
ini = ConfigParser(delimiters=['=']); ini.read(root/'settings.ini', encoding='utf-8')
stems = [p.stem for p in sorted((root/'nbs').glob('[0-9]*.ipynb'))]
modules = {f"cellseg.{s.split('_', 1)[1]}":i for i,s in enumerate(stems)}  # module → place of its notebook in the folder listing

def imports(path):
    "Modules of cellseg that a file imports, with absolute names"
    package = ['cellseg',*path.relative_to(root/'cellseg').parts[:-1]]
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names if a.name.startswith('cellseg'))
        if isinstance(n, ast.ImportFrom):
            base = '.'.join([*package[:len(package)-n.level+1], n.module or ''] if n.level else [n.module])
            if base.startswith('cellseg'): yield base

def python(code):
    "Run code in a fresh interpreter"
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)

def test_version_has_one_home():
    assert cellseg.__version__==ini['DEFAULT']['version']
    from importlib.metadata import version
    assert version('cellseg')==cellseg.__version__

def test_metadata_reaches_the_package():
    from importlib.metadata import metadata, requires
    assert metadata('cellseg')['Author']=='cellseg developers'
    wanted = {re.match(r'[\w-]+', r)[0].lower() for r in ini['DEFAULT']['requirements'].split()}
    got = {re.match(r'[\w-]+', r)[0].lower() for r in requires('cellseg') if 'extra ==' not in r}
    assert got==wanted

def test_every_notebook_number_is_free_of_gaps_in_export():
    "Each numbered notebook exports the module it is named after"
    for name in modules: assert (root/(name.replace('.', '/')+'.py')).is_file(), name

def test_imports_point_down():
    "A module imports only from modules whose notebook stands above its own in the folder listing"
    seen = 0
    for name,place in modules.items():
        for other in imports(root/(name.replace('.', '/')+'.py')):
            if other not in modules: continue
            assert modules[other]<place, f'{name} imports {other}'
            seen += 1
    assert seen>20

def test_ground_layers_need_neither_torch_nor_fastai():
    names = [n for n,k in modules.items() if int(stems[k][:2])<=6]
    assert len(names)>=9
    code = f"import importlib,sys\nfor n in {names}: importlib.import_module(n)\nassert not ({{'torch','fastai'}} & set(sys.modules)), 'heavy imports'"
    r = python(code)
    assert r.returncode==0, r.stderr

def test_import_and_help_load_nothing_heavy():
    "What costs time at import: torch, fastai, pandas, matplotlib, scikit-image; the command's help needs none of them"
    r = python("import sys, cellseg, cellseg.cli\ntry: cellseg.cli.main(['--help'])\nexcept SystemExit: pass\n"
               "print(sorted({'torch','fastai','pandas','matplotlib','skimage','sklearn','tifffile'} & set(sys.modules)))")
    assert r.stdout.splitlines()[-1]=='[]'

def test_all_has_the_names_others_rely_on():
    import cellseg.all as a
    names = '''read_image write_image find_fields kfold_fields simulate_fields fluorescence_labels label_ceiling check_pairs artefact_mask PatchSampler patch_dls create_model list_models n_params
        dice_scores seg_learner Segmenter Prediction cross_validate train Run make_report show_comparison FieldComparer measure_cells compare_cells run_plate image_confidence ImageError FieldsError'''.split()
    assert [n for n in names if not hasattr(a, n)]==[]

def test_readme_is_the_index_notebook():
    assert (root/'README.md').read_text(encoding='utf-8')==render(read_nb(root/'nbs'/'index.ipynb')), 'run: python tests/readme.py'

def test_readme_commands_name_real_options():
    "Every cellseg command of the README is understood by the parser"
    from cellseg.cli import _parser
    import shlex
    lines = re.findall(r'^(?:.*&& )?(?:\.venv/bin/)?cellseg ((?!--).+)$', (root/'README.md').read_text(encoding='utf-8'), re.M)
    assert len(lines)>=3
    for l in lines: assert _parser().parse_args(shlex.split(l)).f

@pytest.mark.parametrize('path', [str(p.relative_to(root)) for p in (root/'nbs').rglob('*.ipynb')])
def test_notebooks_carry_outputs_and_no_machine_paths(path):
    text = (root/path).read_text(encoding='utf-8')
    assert len(text)<(1_000_000 if 'course' in path else 300_000)
    paths = re.findall(r'(?<![\w/+])/(?:tmp|root|home|Users)/[\w.]+', text)
    assert not paths, 'an output shows a path of the machine it ran on'
    nb = read_nb(root/path)
    if any(re.search(r'show_|plt\.', c.source) and '#| eval: false' not in c.source for c in nb.cells if c.cell_type=='code'):
        assert 'image/' in text, 'pictures are not stored'
