"""Cross-validation: sums by hand, intervals, leaks, killed and continued, side by side, on a Dask cluster

Run as a program, this file cross-validates in the folder given, to be killed."""
import json, os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import joblib, numpy as np, pandas as pd, pytest, torch
from cellseg.core import CellsegError, FieldsError
from cellseg.crossval import CrossValidation, bootstrap_means, compare, cross_validate
from cellseg.fields import kfold_fields, load_fields, save_fields
from cellseg.io import read_image, write_image
from cellseg.plot import show_folds
from cellseg.predict import Ensemble, Segmenter
from cellseg.report import make_report
from cellseg.run import train
from cellseg.simulate import simulate_fields
from filelock import FileLock

SMALL = dict(size=32, bs=4, epochs=3, n_train=32, n_valid=4, precision='float32')
CLASSES = ['background','cytoplasm','nucleus']
SHARE = max(1, joblib.cpu_count()//2) # threads of one of two workers

# Planted scores: a folder as `cross_validate` leaves it, with the Dice values given

def planted(folder, dice, fold, group=None, labels='x'):
    "`dice`: field → Dice of each class"
    fields = pd.DataFrame(dict(field=list(dice), fold=fold)).assign(well=group if group is not None else '-')
    folds = sorted(set(fold))
    folder.mkdir(parents=True)
    save_fields(fields, folder/'fields.csv')
    (folder/'config.json').write_text(json.dumps(dict(arch='unet', folds=folds, group='well' if group is not None else None, classes=CLASSES, labels=labels)))
    for f in folds:
        (o := folder/f'fold{f}').mkdir()
        (o/'config.json').write_text(json.dumps(dict(arch='unet', epochs=1, total_seconds=1, valid_fold=f, classes=CLASSES)))
        (o/'history.csv').write_text('epoch,dice\n0,.5\n')
        rows = [(n,c,d,1,1) for n in fields.field[fields.fold==f] for c,d in zip(CLASSES, dice[n])]
        pd.DataFrame(rows, columns=['field','class','dice','n_true','n_pred']).to_csv(o/'scores.csv', index=False)
    return CrossValidation(folder)

def test_summary_by_hand(tmp_path):
    cv = planted(tmp_path/'cv', {'d':[1,.5,.3], 'a':[.8,.6,np.nan], 'b':[.9,.7,.2], 'c':[.7,.2,.6]}, fold=[0,1,0,1])
    s = cv.summary()
    # macro: d .6, a .7 (of two classes), b .6, c .5
    np.testing.assert_allclose(s['mean'], [.85,.5,1.1/3,.6])
    np.testing.assert_allclose(s.std_folds, [abs(.95-.75)/2**.5, abs(.6-.4)/2**.5, abs(.25-.6)/2**.5, 0], atol=1e-12)
    assert s.n.tolist()==[4,4,3,4] and s.index.tolist()==CLASSES+['all'] and set(s.resampled)=={'4 fields'}
    assert (s.low<=s['mean']).all() and (s.high>=s['mean']).all()
    assert cv.worst(2).field.tolist()[0]=='c' and cv.worst(1).dice.tolist()==[pytest.approx(.5)]
    assert len(cv.scores)==12 and cv.scores.fold.tolist()==[0]*6+[1]*6

def test_bootstrap_is_drawing_with_replacement(rng):
    "Against a plain loop, with gaps and groups of different size"
    values,groups = rng.random((14,2)),rng.integers(0, 5, 14)
    values[rng.random((14,2))<.2] = np.nan
    values[0] = .5; groups[:5] = range(5)
    got = bootstrap_means(values, groups, 20_000, seed=1)
    loop = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(groups==g) for g in rng.integers(0, 5, 5)])
        with np.errstate(all='ignore'): loop.append([np.mean(c[~np.isnan(c)]) if (~np.isnan(c)).any() else np.nan for c in values[rows].T])
    for a,b in zip(got.round(9).T, np.array(loop).round(9).T): # Kolmogorov and Smirnov's distance: above .04 with a chance of 1 in 10000
        a,b = (np.sort(o[~np.isnan(o)]) for o in (a,b))
        assert np.abs(np.searchsorted(a, b, 'right')/len(a)-np.searchsorted(b, b, 'right')/len(b)).max()<.04

def test_interval_covers_the_true_mean(rng):
    "Of 1200 samples of 40 fields: the interval holds the true mean about as often as that of the normal approximation does"
    x = rng.normal(.9, .05, (1200,40))
    low,high = np.array([np.percentile(bootstrap_means(o[:,None], n=1000, seed=i), (2.5,97.5)) for i,o in enumerate(x)]).T
    half = 1.96*x.std(axis=1)/40**.5
    assert abs((high-low)/(2*half)-1).mean()<.04
    covered,normal = ((low<.9)&(.9<high)).mean(),(abs(x.mean(axis=1)-.9)<half).mean()
    assert .9<covered<.98 and abs(covered-normal)<.02

def test_groups_widen_the_interval(tmp_path, rng):
    "Fields of one well are alike: drawing fields would pretend to 24 independent ones"
    wells = np.repeat(list('ABCDEF'), 4)
    level = dict(zip('ABCDEF', rng.normal(.8, .05, 6)))
    dice = {f'f{i}':[level[w]+rng.normal(0, .002)]*3 for i,w in enumerate(wells)}
    by_well,by_field = (planted(tmp_path/n, dice, [i//4%3 for i in range(24)], g).summary() for n,g in (('wells',wells),('fields',None)))
    np.testing.assert_allclose(by_well['mean'], by_field['mean'])
    assert set(by_well.resampled)=={'6 groups (well)'}
    assert 1.5<((by_well.high-by_well.low)/(by_field.high-by_field.low)).mean()<2.5 # sqrt(4)

# Comparing

def scores_of(rng, n, better=0.):
    "Dice of n fields that differ in difficulty, and those of another network that is worse by `better`"
    hard = rng.normal(.85, .06, (n,1))
    a,b = (hard-off+rng.normal(0, .01, (n,3)) for off in (0,better))
    return ({f'f{i}':o.tolist() for i,o in enumerate(x)} for x in (a,b))

def test_compare_finds_what_is_there_and_not_what_is_not(tmp_path, rng):
    fold = [i%5 for i in range(40)]
    a,b = (planted(tmp_path/n, d, fold) for n,d in zip('ab', scores_of(rng, 40, .02)))
    t = compare(a, b, names=('new','old'))
    assert (t.low>0).all() and (t.a_better>.99).all() and t.attrs['names']==['new','old']
    np.testing.assert_allclose(t.difference, a.summary()['mean']-b.summary()['mean'], atol=1e-12)
    back = compare(b, a)
    np.testing.assert_allclose([-back.difference,1-back.a_better], [t.difference,t.a_better], atol=1e-12)
    a_alone,b_alone = a.summary(),b.summary()
    assert a_alone.low['all']<b_alone.high['all'] # the intervals of the two alone overlap: only the pairs tell
    found = 0
    for i in range(40):
        a,b = (planted(tmp_path/f'{n}{i}', d, fold) for n,d in zip('ab', scores_of(rng, 40)))
        t = compare(a, b, n_boot=1000)
        found += t.low['all']>0 or t.high['all']<0
    assert found<=9 # 5 % of 40 are 2; more than 9 has a chance below 1 in 1000

def test_compare_refuses_what_is_not_the_same(tmp_path, rng):
    dice = {f'f{i}':[.5]*3 for i in range(4)}
    cv = planted(tmp_path/'cv', dice, [0,0,1,1])
    with pytest.raises(CellsegError, match="2 fields lie in different folds, first 'f1': in fold 0 in .*cv, in fold 1 in .*moved"): compare(cv, planted(tmp_path/'moved', dice, [0,1,0,1]))
    fewer = {k:v for k,v in dice.items() if k!='f3'}
    with pytest.raises(CellsegError, match="cv has 1 fields that .*fewer has not, first 'f3'"): compare(cv, planted(tmp_path/'fewer', fewer, [0,0,1]))
    with pytest.raises(CellsegError, match="fewer2 has not"): compare(planted(tmp_path/'fewer2', fewer, [0,0,1]), cv)
    with pytest.raises(CellsegError, match='label images of'): compare(cv, planted(tmp_path/'labels', dice, [0,0,1,1], labels='y'))
    with pytest.raises(CellsegError, match='no run folder'): compare(cv, tmp_path/'nothing')
    assert compare(str(tmp_path/'cv'), cv).difference.abs().max()==0

# Real, tiny trainings

@pytest.fixture(scope='module')
def fields(tmp_path_factory):
    f = simulate_fields(tmp_path_factory.mktemp('data'), 6, shape=(96,128), confluence=.6)
    return kfold_fields(f.assign(well=list('AABBCC')), 3, group='well')

@pytest.fixture(scope='module')
def cv(fields, tmp_path_factory):
    "Three folds one after the other, in this process, with the threads one of two workers has"
    threads = torch.get_num_threads()
    torch.set_num_threads(SHARE)
    yield cross_validate(fields, 'unet', tmp_path_factory.mktemp('cv')/'cv', group='well', n_jobs=1, **SMALL)
    torch.set_num_threads(threads)

def test_every_field_is_predicted_by_who_never_saw_it(cv, fields):
    assert cv.finished and set(cv.scores.field)==set(fields.field) and len(cv.scores)==18
    for r in cv.runs:
        assert set(r.scores().field)==set(fields.field[fields.fold==r.config['valid_fold']])
        seen = r.fields[r.fields.fold!=r.config['valid_fold']]
        assert not set(seen.well) & set(r.fields.well[r.fields.fold==r.config['valid_fold']])

def test_ensemble_is_the_mean_of_its_members(cv, fields):
    img = read_image(fields.brightfield[0])
    each = np.stack([r.segmenter.predict(img).probs for r in cv.runs])
    assert each.std(axis=0).max()>.01 # they do differ
    for e in (cv.ensemble(), Segmenter.load(cv.folder)):
        np.testing.assert_allclose(e.predict(img).probs, each.mean(axis=0), atol=1e-5)
        assert (e.predict(img).label==e.predict(img).probs.argmax(0)).all()

def test_two_side_by_side_are_as_one_after_the_other(cv, fields, tmp_path):
    both = cross_validate(fields, 'unet', tmp_path/'cv', group='well', n_jobs=2, **SMALL)
    pd.testing.assert_frame_equal(both.scores, cv.scores)
    for a,b in zip(both.fields.probs, cv.fields.probs): assert (read_image(a)==read_image(b)).all()
    assert 'dice' in (tmp_path/'cv'/'fold1'/'log.txt').read_text() # where a worker's epochs went
    with pytest.raises(CellsegError, match='2 weights were given for 3 classes'): cross_validate(fields, 'unet', tmp_path/'bad', n_jobs=2, weights=[1,1], **SMALL)
    assert not (tmp_path/'bad'/'config.json').exists() # nothing had begun: the next call may have other settings
    assert 'Traceback' in (tmp_path/'bad'/'fold0'/'log.txt').read_text()

def test_killed_goes_on(cv, fields, tmp_path):
    "SIGKILL when the first fold is done: it is not trained again, the others go on, and the end is the same"
    save_fields(fields, tmp_path/'fields.csv')
    p = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {'OMP_NUM_THREADS':str(SHARE)})
    out,ends = tmp_path/'cv',time.time()+300
    def done(): return [r.config['valid_fold'] for r in CrossValidation(out).runs] if (out/'config.json').exists() else []
    while not done(): assert p.poll() is None and time.time()<ends, p.stderr.read(); time.sleep(.05)
    while not (out/'fold1'/'checkpoint.pt').exists(): assert p.poll() is None and time.time()<ends; time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.wait()
    first = done()
    assert first in ([0],[0,1])
    with pytest.raises(CellsegError, match='is not finished'): CrossValidation(out).scores
    before = {f:(out/f'fold{f}'/'segmenter'/'weights.safetensors').stat().st_mtime_ns for f in first}
    again = cross_validate(load_fields(tmp_path/'fields.csv'), 'unet', out, group='well', n_jobs=1, **SMALL)
    assert before=={f:(out/f'fold{f}'/'segmenter'/'weights.safetensors').stat().st_mtime_ns for f in first}
    pd.testing.assert_frame_equal(again.scores, cv.scores)

def test_one_fold_at_a_time_in_a_folder(fields, cv, tmp_path):
    "Another process is at work on a fold: that one is left alone"
    shutil.copytree(cv.folder, tmp_path/'cv')
    shutil.rmtree(tmp_path/'cv'/'fold1')
    lock = FileLock(tmp_path/'cv'/'.fold1.lock'); lock.acquire()
    with pytest.raises(CellsegError, match='1 of 3 folds failed.*fold 1: another process'): cross_validate(fields, 'unet', tmp_path/'cv', group='well', n_jobs=1, **SMALL)
    lock.release()

def test_on_a_dask_cluster_of_two_workers(cv, fields, tmp_path):
    distributed = pytest.importorskip('distributed')
    kw = dict(dashboard_address=None, n_workers=2)
    with distributed.LocalCluster(threads_per_worker=1, processes=True, **kw) as cluster, distributed.Client(cluster) as client:
        there = cross_validate(fields, 'unet', tmp_path/'cv', group='well', backend='dask', **SMALL)
        pids = client.run(os.getpid)
    pd.testing.assert_frame_equal(there.scores, cv.scores)
    assert len(set(pids.values()))==2 and os.getpid() not in pids.values()
    assert all((there.folder/f'fold{f}'/'log.txt').exists() for f in range(3)) # trained in workers
    with distributed.LocalCluster(threads_per_worker=2, processes=False, **kw) as cluster, distributed.Client(cluster):
        with pytest.raises(CellsegError, match='processes=True'): cross_validate(fields, 'unet', tmp_path/'no', backend='dask', **SMALL)
    with pytest.raises(CellsegError, match='make a `distributed.Client` first'): cross_validate(fields, 'unet', tmp_path/'no', backend='dask', **SMALL)

# What can't be

def test_leaks_are_refused(fields, tmp_path):
    shutil.copy(fields.brightfield[0], tmp_path/'another_name.tif')
    twin = fields.iloc[[0]].assign(field='twin', brightfield=str(tmp_path/'another_name.tif'), well='D', fold=(fields.fold[0]+1)%3)
    both = pd.concat([fields,twin], ignore_index=True)
    with pytest.raises(FieldsError, match=f"fields '{fields.field[0]}' .* and 'twin' .* have the same brightfield image: .*Remove one of them"): cross_validate(both, 'unet', tmp_path/'cv', **SMALL)
    with pytest.raises(FieldsError, match="have the same well, A.*Make the folds anew"): cross_validate(fields.assign(fold=[0,1,1,1,2,2]), 'unet', tmp_path/'cv', group='well', **SMALL)
    assert not (tmp_path/'cv').exists()
    strip,folds = show_folds(both, 'well')
    assert 'well' not in [t.get_text() for t in strip.texts] and len(strip.texts)==both.well.nunique()==4
    assert folds.images[0].get_array().shape[:2]==(3,7)

@pytest.mark.parametrize('change,kw,why', [
    (dict(), dict(k=7), '7 folds of 6 fields'), (dict(), dict(k=4, group='well'), '4 folds of 3 different values of well'),
    (dict(well='A'), dict(k=2, group='well'), "all 6 fields have one well, 'A'"), (dict(well=['A','B',None,'C','D','E']), dict(k=2, group='well'), 'has no well'),
    (dict(well=['A','B',None,'C','D','E']), dict(k=2, stratify='well'), 'has no well'), (dict(fold=0), {}, 'all fields are in fold 0'), (dict(fold=[0,1,None,0,1,0]), {}, 'whole number'),
    (dict(fold=list('ababab')), {}, 'whole number'), (dict(), dict(group='donor'), "no column 'donor'"), (dict(fold=[0,1]*3), dict(n_jobs=0), 'from 1, not 0'),
    (dict(fold=[0,1]*3), dict(backend='threads'), "not 'threads'"), (dict(fold=[0,1]*3), dict(arch='vnet', n_jobs=1), "no network 'vnet'"), (dict(fold=[0,1]*3), dict(size=128, n_jobs=1), 'smaller than a patch of 128')])
def test_bad_input(fields, tmp_path, change, kw, why):
    kw = dict(arch='unet') | SMALL | kw
    with pytest.raises(CellsegError, match=why): cross_validate(fields.drop(columns='fold').assign(**change), out=tmp_path/'cv', **kw)
    assert not (tmp_path/'cv'/'config.json').exists()

def test_a_fold_without_a_class(fields, tmp_path):
    def without(path, name):
        lbl = read_image(path); lbl[lbl==2] = 1
        write_image(tmp_path/name, lbl)
        return str(tmp_path/name)
    labels = [without(p, f'{i}.tif') if i>=2 else p for i,p in enumerate(fields.label)]
    two = fields.assign(label=labels, fold=[0,0,1,1,1,1])
    with pytest.raises(FieldsError, match='fold 0: none of its 4 training fields shows nucleus'): cross_validate(two, 'unet', tmp_path/'cv', n_jobs=1, **SMALL)
    with pytest.warns(UserWarning, match='fold 1: none of its 2 held-out fields shows nucleus'): cv = cross_validate(two.assign(fold=[0,2,1,1,2,0]), 'unet', tmp_path/'cv', n_jobs=1, **SMALL | dict(epochs=1))
    s = cv.summary()
    assert s.n['background']==6 and s.n['nucleus']<=6 and 0<=s['mean']['nucleus']<=1
    with pytest.raises(FieldsError, match='no label image shows nucleus'): cross_validate(two[2:].assign(fold=[0,1]*2), 'unet', tmp_path/'cv2', **SMALL)

def test_odd_tables(fields, tmp_path):
    "A channel that one field lacks, ids that pandas would take for missing values, folds as 0.0 and 1.0; and what may not replace what"
    odd = fields.assign(field=['NA','None','nan','d','e','f'], fold=[0.,1.]*3, nuclei=[None,*fields.nuclei[1:]])
    save_fields(odd, tmp_path/'fields.csv')
    quick = SMALL | dict(epochs=1, n_train=8, n_jobs=1)
    for table in (odd,load_fields(tmp_path/'fields.csv')): cv = cross_validate(table, 'unet', tmp_path/'cv', **quick) # the second: the same, done before
    assert set(cv.scores.field)==set(odd.field) and cv.summary().n['all']==6
    html = make_report(cv).read_text(encoding='utf-8')
    assert all(re.search(rf'<p>\s*{f}\s*: mean Dice', html) for f in odd.field) # each is drawn
    assert isinstance(Segmenter.load(cv.folder), Ensemble)
    with pytest.raises(CellsegError, match='holds a cross-validation'): train(odd, cv.folder, overwrite=True, size=32, bs=4, epochs=1, n_train=8)
    (tmp_path/'seg').mkdir()
    for text in ('{}','[]','{"members": ["."]}','{"members": ["../cv/fold0"]}'):
        (tmp_path/'seg'/'ensemble.json').write_text(text)
        with pytest.raises(CellsegError, match='is damaged'): Segmenter.load(tmp_path/'seg')
    cv.runs[0].segmenter.save(tmp_path/'seg') # replaces the ensemble
    assert not isinstance(Segmenter.load(tmp_path/'seg'), Ensemble)
    (cv.folder/'config.json').unlink()
    with pytest.raises(CellsegError, match='holds fold 0 of a cross-validation whose config.json is gone'): cross_validate(odd, 'unet', cv.folder, **quick | dict(epochs=2))

def test_another_experiment_in_the_folder(cv, fields):
    for kw,why in [(dict(SMALL, epochs=2), 'its epochs is 3, here 2'), (dict(SMALL, batch_tfms=()), 'its augment is None'), (dict(SMALL, seed=1), 'its seed is 0, here 1')]:
        with pytest.raises(CellsegError, match=why): cross_validate(fields, 'unet', cv.folder, group='well', **kw)
    with pytest.raises(CellsegError, match='its group is'): cross_validate(fields, 'unet', cv.folder, **SMALL)
    with pytest.raises(CellsegError, match='its arch is'): cross_validate(fields, 'tiramisu', cv.folder, group='well', **SMALL)
    with pytest.raises(CellsegError, match='its images, labels or folds are others'): cross_validate(fields.assign(label=fields.label[::-1].tolist()), 'unet', cv.folder, group='well', **SMALL)
    with pytest.raises(CellsegError, match='its images, labels or folds are others'): cross_validate(fields.assign(fold=(fields.fold+1)%3), 'unet', cv.folder, group='well', **SMALL)
    with pytest.raises(CellsegError, match='holds a single run'): cross_validate(fields, 'unet', cv.folder/'fold0', group='well', **SMALL)
    assert CrossValidation(cv.folder).finished

if __name__=='__main__':
    folder = Path(sys.argv[1])
    torch.set_num_threads(SHARE)
    cross_validate(load_fields(folder/'fields.csv'), 'unet', folder/'cv', group='well', n_jobs=1, **SMALL)
