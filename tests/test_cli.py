"The command line as a user meets it: the whole way on simulated fields, a folder with bad files, exit codes"
import json, os, shutil, signal, subprocess, sys, time
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

PATTERN = ('--pattern','{field}_{channel}.tif','--channels','brightfield=brightfield','nuclei=nuclei','cytoplasm=cytoplasm')

def test_train_leaves_out_what_the_check_excludes(cellseg, tmp_path):
    "One pair shifted by 12 px, one whose nuclear stain failed: both are named and not trained on; --no-check trains on the shifted one"
    fields = simulate_fields(tmp_path/'images', 6, shape=(300,320), confluence=.5, seed=2)
    for p in (*fields.label,*fields.cells): os.unlink(p)
    for c in ('nuclei','cytoplasm'): write_image(fields[c][1], np.roll(read_image(fields[c][1]), 12, 0), pixel_size=.345)
    write_image(fields.nuclei[4], np.random.default_rng(0).poisson(320, (300,320)).astype(np.uint16), pixel_size=.345)
    args = ('train',tmp_path/'images',*PATTERN,'--folds',2,'--size',64,'--batch',4,'--epochs',1,'--patches',8)
    code,out,err = cellseg(*args, '--out', tmp_path/'run')
    assert code==0, err
    assert 'exclude sim0001' in out and '12.' in out.split('exclude sim0001')[1][:40] and 'exclude sim0004' in out and 'left out: sim0001, sim0004' in out
    trained = pd.read_csv(tmp_path/'run'/'fields.csv')
    assert trained.field.tolist()==['sim0000','sim0002','sim0003','sim0005'] and set(trained.verdict)<={'fit','look'}
    html = (tmp_path/'run'/'report.html').read_text(encoding='utf-8')
    assert 'Ceiling' in html and 'at a glance' in html and (tmp_path/'run'/'ceiling.csv').exists()
    code,out,err = cellseg(*args, '--out', tmp_path/'all', '--no-check')
    assert code==0 and 'exclude' not in out and len(pd.read_csv(tmp_path/'all'/'fields.csv'))==6

def test_train_with_nothing_fit_says_so(cellseg, tmp_path):
    fields = simulate_fields(tmp_path/'images', 2, shape=(200,220), seed=2)
    for p in fields.nuclei: write_image(p, np.random.default_rng(0).poisson(320, (200,220)).astype(np.uint16))
    code,out,err = cellseg('train', tmp_path/'images', *PATTERN, '--out', tmp_path/'run')
    assert code==2 and 'all 2 fields are to be excluded' in err and '--no-check' in err

def test_artefacts_are_ignored_in_labels_and_not_judged_in_predictions(cellseg, tmp_path):
    fields = simulate_fields(tmp_path/'images', 4, shape=(400,420), confluence=.6, seed=3, bubbles=1, pixel_size=.65)
    for p in (*fields.label,*fields.cells): os.unlink(p)
    code,out,err = cellseg('label', tmp_path/'images', *PATTERN, '--out', tmp_path/'labels')
    assert code==0, err
    table = pd.read_csv(tmp_path/'labels'/'fields.csv')
    for f in table.itertuples():
        bubble = read_image(tmp_path/'images'/f'{f.field}_artefact.tif')==2
        assert (read_image(f.label)[bubble]==255).mean()>.95 and abs(f.artefact_share-(read_image(f.label)==255).mean())<1e-6
    code,out,err = cellseg('label', tmp_path/'images', *PATTERN, '--out', tmp_path/'kept', '--keep-artefacts')
    assert code==0 and all(read_image(p).max()==2 for p in pd.read_csv(tmp_path/'kept'/'fields.csv').label)
    code,out,err = cellseg('train', tmp_path/'labels'/'fields.csv', '--out', tmp_path/'run', '--folds', 2, '--size', 64, '--batch', 4, '--epochs', 1, '--patches', 8)
    assert code==0, err
    new = ('predict', tmp_path/'run', fields.brightfield[0], '--out')
    assert cellseg(*new, tmp_path/'p')[0]==0 and cellseg(*new, tmp_path/'guess', '--keep-artefacts')[0]==0
    bubble = read_image(fields.artefact[0])==2
    judged,guessed = (read_image(next((tmp_path/o).glob('*_label.tif'))) for o in ('p','guess'))
    assert (judged[bubble]==255).mean()>.95 and guessed.max()<=2 and (judged==guessed)[judged!=255].all()
    assert 't be judged' in (tmp_path/'p'/'report.html').read_text(encoding='utf-8')

def test_label_from_masks(cellseg, tmp_path):
    fields = simulate_fields(tmp_path/'images', 2, shape=(120,130), seed=1)
    for f in fields.itertuples():
        lbl = read_image(f.label)
        write_image(tmp_path/'images'/f'{f.field}_n.png', ((lbl==2)*255).astype(np.uint8)); write_image(tmp_path/'images'/f'{f.field}_c.png', (lbl>0).astype(np.uint8))
    code,out,err = cellseg('label', tmp_path/'images', '--pattern', '{field}_{channel}.png', '--channels', 'nuclei_mask=n', 'cell_mask=c', '--out', tmp_path/'out')
    assert code==0, err
    for p,truth in zip(pd.read_csv(tmp_path/'out'/'fields.csv').label, fields.label): np.testing.assert_array_equal(read_image(p), read_image(truth))

def test_killed_labelling_and_check_go_on(tmp_path):
    "SIGKILL to the whole group of processes once some fields are done: the next call does the rest, and repeats nothing"
    fields = simulate_fields(tmp_path/'images', 10, shape=(500,600), confluence=.5, seed=1)
    for p in (*fields.label,*fields.cells): os.unlink(p)
    for command,out in (('label',tmp_path/'labels'),('check',tmp_path/'check')):
        args = [sys.executable,'-c','import sys; from cellseg.cli import main; sys.exit(main())',command,str(tmp_path/'images'),*PATTERN,'--out',str(out),'--jobs','2']
        kept = (out/'plain'/'.done') if command=='label' else out/'.done'
        p = subprocess.Popen(args, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(600):
            if kept.is_dir() and len(list(kept.glob('[!.]*.json')))>=3: break
            time.sleep(.05)
        os.killpg(p.pid, signal.SIGKILL); p.wait()
        before = {q.name:q.stat().st_mtime_ns for q in kept.glob('[!.]*.json')}
        assert 3<=len(before)<10, 'killed too early or too late to tell'
        done = subprocess.run(args, capture_output=True, text=True, timeout=300)
        assert done.returncode==0, done.stderr
        after = {q.name:q.stat().st_mtime_ns for q in kept.glob('[!.]*.json')}
        assert len(after)==10 and {k:after[k] for k in before}==before

def test_plate_and_measure(cellseg, tmp_path):
    "A plate from a run and from label images: tables, OME-Zarr and report; another folder's plate is refused; a bad file is listed"
    from cellseg.core import seeded
    from cellseg.models.registry import create_model
    from cellseg.predict import Segmenter
    table = simulate_fields(tmp_path/'images', 3, shape=(160,200), confluence=.5).drop(columns='cells').assign(well=['A01','A02','B01'])
    table.to_csv(tmp_path/'fields.csv', index=False)
    with seeded(0): Segmenter(create_model('unet'), 'unet', pixel_size=.345).save(tmp_path/'seg')
    code,out,err = cellseg('plate', tmp_path/'seg', tmp_path/'fields.csv', '--out', tmp_path/'plate', '--jobs', 1, '--images', 'nuclei')
    assert code==0 and '3 of 3 fields' in out, err
    cells,fields = pd.read_parquet(tmp_path/'plate'/'cells.parquet'),pd.read_csv(tmp_path/'plate'/'fields.csv')
    assert 'nuclei_in_nucleus' in cells and (fields['count']+fields.without_nucleus).sum()==len(cells) and {'n_true','confidence'} <= set(fields)
    assert (tmp_path/'plate'/'plate.zarr'/'A'/'2'/'0'/'labels'/'cells').is_dir()
    html = (tmp_path/'plate'/'report.html').read_text()
    assert 'heat map of nuclei a field' in html and 'How wrong are the counts?' in html
    (tmp_path/'plate'/'report.html').unlink()
    assert cellseg('report', tmp_path/'plate')[0]==0 and (tmp_path/'plate'/'report.html').exists()
    code,out,err = cellseg('measure', tmp_path/'fields.csv', '--out', tmp_path/'plate')
    assert code==2 and 'another plate' in err
    (tmp_path/'images'/'sim0001_label.tif').write_bytes(b'no image')
    code,out,err = cellseg('measure', tmp_path/'fields.csv', '--out', tmp_path/'stained', '--jobs', 1)
    assert code==1 and 'sim0001_label.tif' in err and '2 of 3 fields' in out and 'sim0001' in (tmp_path/'stained'/'report.html').read_text()
    code,out,err = cellseg('plate', tmp_path/'seg', tmp_path/'plate'/'plate.zarr', '--out', tmp_path/'again', '--jobs', 1) # an OME-Zarr plate in
    assert code==0 and sorted(pd.read_csv(tmp_path/'again'/'fields.csv').well)==['A01','A02','B01'], err
    a,b = (pd.read_csv(tmp_path/f/'fields.csv').confluence for f in ('plate','again'))
    np.testing.assert_allclose(a, b)
