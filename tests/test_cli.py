"The command line as a user meets it: the whole way on simulated fields, a folder with bad files, exit codes"
import json, shutil, subprocess
import numpy as np, pandas as pd
from cellseg.io import read_image, write_image, image_info
from cellseg.simulate import simulate_fields

def test_demo_reaches_its_promise(cellseg, tmp_path):
    "`cellseg demo` at its own settings: macro Dice 0.85 on held-out fields, against labels and exact truth"
    code,out,err = cellseg('demo', '--out', tmp_path/'demo')
    assert code==0, err
    for name in ('scores.csv','scores_truth.csv'):
        scores = pd.read_csv(tmp_path/'demo'/name)
        assert scores.field.nunique()==2
        assert scores.groupby('field').dice.mean().mean()>.85
    assert 'nucleus' in out and 'report.html' in out
    folds = pd.read_csv(tmp_path/'demo'/'fields.csv').set_index('field').fold
    assert set(scores.field)==set(folds.index[folds==0]) # scored on the fields that were not trained on
    again = cellseg('demo', '--out', tmp_path/'demo')
    assert again[0]==2 and '--overwrite' in again[2]

def test_train_predict_and_go_past_bad_files(cellseg, tmp_path):
    simulate_fields(tmp_path/'images', 5, shape=(200,240), confluence=.6)
    for p in (tmp_path/'images').glob('*_label.tif'): p.unlink() # as with real images: labels come from the stains
    code,out,err = cellseg('train', tmp_path/'images', '--pattern', '{field}_{channel}.tif', '--channels', 'brightfield=brightfield', 'nuclei=nuclei',
        'cytoplasm=cytoplasm', '--out', tmp_path/'run', '--size', 64, '--batch', 4, '--epochs', 2, '--patches', 16)
    assert code==0, err
    assert (tmp_path/'run'/'report.html').exists()
    config = json.loads((tmp_path/'run'/'config.json').read_text())
    assert config['size']==64 and config['epochs']==2 and config['n_train_fields']==4
    new = tmp_path/'new'; new.mkdir()
    shutil.copy(tmp_path/'images'/'sim0000_brightfield.tif', new/'good.tif')
    (new/'text.tif').write_text('this is no image'); (new/'empty.tif').touch()
    write_image(new/'colour.png', np.random.default_rng(0).integers(0, 255, (3,50,60)).astype(np.uint8))
    (new/'notes.txt').write_text('not meant')
    code,out,err = cellseg('predict', tmp_path/'run', new, '--out', tmp_path/'out')
    assert code==1 # done, but for some files
    for bad in ('text.tif','empty.tif','colour.png'): assert bad in err
    assert '3 of 4 fields could not be done' in err and '1 of 4 fields predicted' in out
    assert sorted(p.name for p in (tmp_path/'out').iterdir())==['fields.csv','good_label.tif','report.html']
    assert image_info(tmp_path/'out'/'good_label.tif').pixel_size==image_info(new/'good.tif').pixel_size
    (new/'good.tif').unlink()
    assert cellseg('predict', tmp_path/'run', new, '--out', tmp_path/'out2')[0]==2 # nothing could be done

def test_crossval_report_and_use(cellseg, tmp_path):
    "Every field scored, wells kept together, the folder used for new images, and an error for other settings"
    table = simulate_fields(tmp_path/'images', 4, shape=(96,128), confluence=.6)
    table.assign(well=['A','A','B','B']).to_csv(tmp_path/'fields.csv', index=False)
    args = ('crossval', tmp_path/'fields.csv', '--out', tmp_path/'cv', '--folds', 2, '--group', 'well', '--size', 32, '--batch', 4, '--patches', 8, '--jobs', 1, '--epochs')
    code,out,err = cellseg(*args, 1)
    assert code==0, err
    assert '2 groups (well) drawn' in out and 'report.html' in out and 'nucleus' in out
    fields = pd.read_csv(tmp_path/'cv'/'fields.csv')
    assert fields.groupby('well').fold.nunique().max()==1 and fields.fold.nunique()==2
    html = (tmp_path/'cv'/'report.html').read_text()
    assert all(f in html for f in fields.field) and '95 % interval' in html
    (tmp_path/'cv'/'report.html').unlink()
    assert cellseg('report', tmp_path/'cv')[0]==0 and (tmp_path/'cv'/'report.html').exists()
    code,out,err = cellseg('predict', tmp_path/'cv', tmp_path/'fields.csv', '--out', tmp_path/'out')
    assert code==0 and '4 of 4 fields predicted' in out
    code,out,err = cellseg(*args, 2)
    assert code==2 and 'its epochs is 1, here 2' in err and 'Traceback' not in err
    code,out,err = cellseg(*args, 1)
    assert code==0 and out.count('done before')==2

def test_label_and_fields_round_trip(cellseg, tmp_path):
    "The table that one command writes is what the next one reads"
    assert cellseg('simulate', tmp_path/'sim', '-n', 2, '--height', 150, '--width', 180, '--confluence', .5)[0]==0
    code,out,err = cellseg('label', tmp_path/'sim'/'fields.csv', '--out', tmp_path/'labels')
    assert code==0 and '2 of 2 fields labelled' in out
    table = pd.read_csv(tmp_path/'labels'/'fields.csv')
    for a,b in zip(table.label, pd.read_csv(tmp_path/'sim'/'fields.csv').label):
        assert (read_image(a)==read_image(b)).mean()>.9 # labels from fluorescence are close to the exact truth

def test_exit_codes_from_a_shell():
    def run(*a): return subprocess.run(['cellseg', *a], capture_output=True, text=True)
    assert run('--help').returncode==0
    for c in 'demo fields simulate label train crossval predict report'.split():
        r = run(c, '--help')
        assert r.returncode==0 and 'example:' in r.stdout
    r = run('report', 'no-such-run')
    assert r.returncode==2 and 'no-such-run' in r.stderr and 'Traceback' not in r.stderr
