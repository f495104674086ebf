"What a user can get wrong, each met by one clear line that names the file, exit code 2, and nothing half-written"
import resource, signal
from contextlib import contextmanager
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cellseg.core import CellsegError, seeded
from cellseg.io import read_image, write_image
from cellseg.fields import save_fields
from cellseg.simulate import simulate_fields

@pytest.fixture
def fields(tmp_path): return simulate_fields(tmp_path/'data', 3, shape=(160,200), confluence=.6)

def train(cellseg, tmp_path, fields, *args):
    save_fields(fields, tmp_path/'fields.csv')
    return cellseg('train', tmp_path/'fields.csv', '--out', tmp_path/'run', '--folds', 3, '--size', 64, '--batch', 4, '--epochs', 1, '--patches', 8, *args)

def change(path, f):
    "Rewrite an image as a new file beside it, changed by `f`"
    new = Path(path).with_name('changed.tif')
    write_image(new, f(read_image(path)))
    return str(new)

def with_nan(img): out = img.astype(np.float32); out[5,5] = np.nan; return out
def with_inf(img): out = img.astype(np.float32); out[0,0] = np.inf; return out

cases = dict(
    other_size=('brightfield', lambda i: i[:-8], 'changed.tif', '(152, 200)'),
    colour=('brightfield', lambda i: np.stack([i]*3), 'changed.tif', '(3, 160, 200)'),
    constant=('brightfield', lambda i: np.full_like(i, 7), 'changed.tif', '7 everywhere'),
    nan=('brightfield', with_nan, 'changed.tif', 'NaN'),
    infinity=('brightfield', with_inf, 'changed.tif', 'infinite'),
    label_out_of_range=('label', lambda i: np.where(i==2, 9, i).astype(np.uint8), 'changed.tif', 'label 9'),
    label_no_number=('label', lambda i: i.astype(np.float32)/2, 'changed.tif', 'no labels'))

@pytest.mark.parametrize('case', cases)
def test_bad_image(cellseg, tmp_path, fields, case):
    column,f,*words = cases[case]
    fields.loc[1,column] = change(fields[column][1], f)
    code,out,err = train(cellseg, tmp_path, fields)
    assert code==2
    for w in words: assert w in err, err
    assert 'Traceback' not in err and not (tmp_path/'run'/'config.json').exists()

@pytest.mark.parametrize('content', [b'', b'some text', 'half'])
def test_broken_file(cellseg, tmp_path, fields, content):
    bad = tmp_path/'data'/'broken.tif'
    whole = Path(fields.brightfield[2]).read_bytes()
    bad.write_bytes(whole[:len(whole)//2] if content=='half' else content)
    fields.loc[2,'brightfield'] = str(bad)
    code,out,err = train(cellseg, tmp_path, fields)
    assert code==2 and 'broken.tif' in err and 'Traceback' not in err

def test_missing_file(cellseg, tmp_path, fields):
    Path(fields.brightfield[0]).unlink()
    code,out,err = train(cellseg, tmp_path, fields)
    assert code==2 and Path(fields.brightfield[0]).name in err

@pytest.mark.parametrize('args,words', [(('--size',512), 'smaller than a patch of 512'), (('--arch','vnet'), "no network 'vnet'"), (('--folds',4), '4 folds of 3'),
    (('--group','plate'), "'plate'"), (('--inputs','phase'), "'phase'"), (('--classes','background','nucleus'), 'label 2')])
def test_bad_setting(cellseg, tmp_path, fields, args, words):
    code,out,err = train(cellseg, tmp_path, fields, *args)
    assert code==2 and words in err and 'Traceback' not in err

def test_empty_folder(cellseg, tmp_path):
    (tmp_path/'empty').mkdir()
    code,out,err = cellseg('fields', tmp_path/'empty', '--pattern', '{field}.tif', '--channels', 'brightfield=0')
    assert code==2 and str(tmp_path/'empty') in err

def test_folder_that_cannot_be_written(cellseg, tmp_path, fields):
    (tmp_path/'run').write_text('a file where the folder should be')
    code,out,err = train(cellseg, tmp_path, fields)
    assert code==2 and str(tmp_path/'run') in err and 'Traceback' not in err

@contextmanager
def full_disc(limit):
    "No file can grow beyond `limit` bytes, as on a disc that is full"
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit,hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft,hard)); signal.signal(signal.SIGXFSZ, old)

def test_full_disc_while_training(cellseg, tmp_path, fields):
    with full_disc(30_000): code,out,err = train(cellseg, tmp_path, fields)
    assert code==2 and 'could not be written' in err and 'Traceback' not in err
    assert not list(tmp_path.rglob('*.safetensors')) and not list((tmp_path/'run').rglob('.*'))

def test_full_disc_while_predicting(tmp_path, fields):
    "Each field is listed with its reason; no label image is left under its name, and earlier ones are intact"
    from cellseg.models.registry import create_model
    from cellseg.predict import Segmenter, predict_fields
    with seeded(0): seg = Segmenter(create_model('unet'), 'unet')
    before = predict_fields(fields[:1], seg, tmp_path/'out', progress=False).prediction[0]
    content = Path(before).read_bytes()
    with full_disc(200): table = predict_fields(fields, seg, tmp_path/'out', progress=False)
    assert table.prediction.isna().all() and table.problem.str.contains('could not be written').all()
    assert [p.name for p in (tmp_path/'out').iterdir()]==[Path(before).name] and Path(before).read_bytes()==content
    with full_disc(1000), pytest.raises(CellsegError, match='weights.safetensors could not be written'): seg.save(tmp_path/'seg')
    assert not list((tmp_path/'seg').iterdir())

def test_field_without_a_channel_is_named_and_left_out(cellseg, tmp_path, fields):
    four = pd.concat([fields, fields.iloc[:1].assign(field='lacking', brightfield=None)], ignore_index=True)
    code,out,err = train(cellseg, tmp_path, four)
    assert code==0 and 'left out 1 of 4 fields' in err and 'lacking' in err

@pytest.mark.parametrize('arch,kwargs,message', [
    ('deeplabv3plus', {}, r"network 'unet' \(here: 'deeplabv3plus'\)"),
    ('unet', dict(classes=('background','cytoplasm','nucleus','debris')), r"classes \['background', 'cytoplasm', 'nucleus'\] \(here: \['background', 'cytoplasm', 'nucleus', 'debris'\]\)"),
    ('unet', dict(inputs=('brightfield','nuclei')), r"inputs \['brightfield'\] \(here: \['brightfield', 'nuclei'\]\)")])
def test_checkpoint_of_another_training_says_both(tmp_path, fields, arch, kwargs, message):
    "Another network, number of classes or list of channels: refused before anything is trained, and the checkpoint stays"
    from cellseg.data import patch_dls
    from cellseg.learner import seg_learner
    def learner(arch, **kwargs): return seg_learner(patch_dls(fields.assign(fold=[0,1,2]), size=32, bs=2, n_train=2, n_valid=1, **kwargs), arch, tmp_path/'run')
    learner('unet').fit_paper(1)
    before = (tmp_path/'run'/'checkpoint.pt').read_bytes()
    with pytest.raises(CellsegError, match=message): learner(arch, **kwargs).fit_paper(1, resume=True)
    assert (tmp_path/'run'/'checkpoint.pt').read_bytes()==before
