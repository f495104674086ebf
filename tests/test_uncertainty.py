"Uncertainty: against scipy and scikit-learn, temperatures that are known, and confidences of fields whose faults are known"
import warnings
import numpy as np, pandas as pd, pytest
from scipy.stats import entropy as scipy_entropy, spearmanr
from sklearn.metrics import log_loss
from cellseg.core import CLASSES,IGNORE,CellsegError,FieldsError
from cellseg.io import read_image,write_image
from cellseg.simulate import simulate_field
from cellseg.uncertainty import (apply_temperature,best_temperature,calibration_bins,calibration_error,check_probs,class_certainty,disagreement,entropy,
    field_confidences,fit_temperature,image_again,image_confidence,sample_pixels)

def softmax(z): z = np.exp(z-z.max(0)); return z/z.sum(0)
def uint8(p): return (p*255).round().astype(np.uint8)
def drawn(rng, p): return (p.cumsum(0)<rng.random(p.shape[1:])).sum(0).clip(0, len(p)-1).astype(np.uint8)
def some_probs(rng, k=3, shape=(40,50), sharp=2): return softmax(rng.normal(0, sharp, (k,*shape)))

# ---- maps

@pytest.mark.parametrize('k', (2,3,7))
def test_entropy_is_scipys(rng, k):
    p = some_probs(rng, k)
    np.testing.assert_allclose(entropy(p), scipy_entropy(p, axis=0)/np.log(k), atol=1e-5)
    np.testing.assert_allclose(entropy(uint8(p)), entropy(p), atol=.05)
    assert entropy(p).dtype==np.float32 and entropy(p.astype(np.float16)).shape==p.shape[1:]
    turned = entropy(p[rng.permutation(k)])
    np.testing.assert_allclose(turned, entropy(p), atol=1e-6)

@pytest.mark.parametrize('n', (2,3,5))
def test_disagreement_is_the_information_between_member_and_class(rng, n):
    "As the mean Kullback-Leibler divergence of the members from their mean, another way to write it"
    ps = [some_probs(rng) for _ in range(n)]
    mean = sum(ps)/n
    want = sum(scipy_entropy(p, mean, axis=0) for p in ps)/n/np.log(3)
    np.testing.assert_allclose(disagreement(ps), want, atol=1e-5)
    np.testing.assert_allclose(disagreement(ps[::-1]), want, atol=1e-5)
    assert disagreement([ps[0]]*n).max()<1e-6
    mixed = disagreement([uint8(p) if i%2 else p for i,p in enumerate(ps)])
    assert np.abs(mixed-want).mean()<.01

@pytest.mark.parametrize('bad,why', ((np.full((3,4,5), .5),'do not add up to 1'), (np.full((3,4,5), 100, np.uint8),'do not add up to 1'), (np.full((3,4,5), 1),'hold int64'), (np.full((1,4,5), 1.),'2 or more'),
    (np.array([[[-.2]],[[1.2]]]),'do not add up to 1'), (np.array([[[np.nan]],[[.5]]]),'NaN at 1 pixels'), (np.array([[[np.inf]],[[.5]]]),'do not add up to 1'), (np.array([.2,.8]),'shape'), (np.ones((2,3), complex),'hold complex')))
def test_what_is_no_probability(bad, why):
    for f in (entropy, check_probs, image_confidence, lambda p: disagreement([p,p]), lambda p: apply_temperature(p, 2)):
        with pytest.raises(CellsegError, match=why): f(bad)

def test_many_classes_as_uint8(rng):
    "Rounding errors of 30 classes add up, and are no fault"
    p = softmax(rng.normal(0, .3, (30,50,50)))
    for q in (p,np.full((30,5,5), 1/30)): np.testing.assert_allclose(check_probs(uint8(q)).sum(0), 1, atol=1e-5)

# ---- temperature

@pytest.mark.parametrize('true', (.6,1.,1.7,3.))
@pytest.mark.parametrize('sharp', (2,6,12))
def test_a_known_temperature_is_found_again(rng, true, sharp):
    "Labels drawn with known probabilities; the network says them `true` times too sharply"
    z = rng.normal(0, sharp*max(true, 1)/3, (3,60_000))
    label = drawn(rng, softmax(z/true))
    said = softmax(z)
    label[rng.random(label.shape)<.1] = IGNORE
    assert best_temperature(said, label)==pytest.approx(true, rel=.06)
    assert best_temperature(uint8(said), label)==pytest.approx(true, rel=.08)

def test_temperature_is_the_minimum_of_sklearns_log_loss(rng):
    p = some_probs(rng, 4, (3000,), sharp=3)
    y = drawn(rng, softmax(np.log(p)*.6))
    T = best_temperature(p, y)
    def loss(t): q = apply_temperature(p, t).T.astype(float); return log_loss(y, q/q.sum(1, keepdims=True), labels=range(4))
    assert loss(T)<min(loss(T*1.03), loss(T/1.03), loss(1))
    for keep in (p,uint8(p)): assert (apply_temperature(keep, 3).argmax(0)==keep.argmax(0)).all()
    np.testing.assert_allclose(apply_temperature(apply_temperature(p, 3), 1/3), p, atol=1e-4)
    np.testing.assert_allclose(apply_temperature(p, 1), p, atol=1e-6)

def test_calibration_error_before_and_after(rng):
    z = rng.normal(0, 6, (3,200,200))
    y,said = drawn(rng, softmax(z/2.5)),softmax(z)
    T = best_temperature(uint8(said), y)
    before,after = (calibration_error(calibration_bins(p, y, n=15)) for p in (said,apply_temperature(said, T)))
    assert before>.08 and after<.02

def test_a_class_that_never_occurs(rng):
    p = np.concatenate([some_probs(rng, 2, (5000,))*.999,np.full((1,5000), .001)])
    y = drawn(rng, p/p.sum(0)); y[y==2] = 0
    assert .8<best_temperature(p, y)<1.2
    c = class_certainty(p, p.argmax(0))
    assert np.isnan(c[2]) and not np.isnan(c[:2]).any()

def test_labels_of_something_else_are_noticed(rng):
    p = some_probs(rng, 3, (4000,), 4)
    with pytest.warns(UserWarning, match='end of the range'): best_temperature(p, rng.integers(0, 3, 4000))
    with pytest.warns(UserWarning, match='end of the range'): best_temperature(p, p.argmax(0)) # never wrong

# ---- tables of fields

@pytest.fixture
def table(tmp_path, rng):
    rows = []
    for i in range(4):
        z = rng.normal(0, 5, (3,70,80)); y = drawn(rng, softmax(z/2)); y[:5] = IGNORE
        row = dict(field=f'f{i}', label=str(tmp_path/f'f{i}_label.tif'), probs=str(tmp_path/f'f{i}_probs.tif'))
        write_image(row['label'], y); write_image(row['probs'], uint8(softmax(z)))
        rows.append(row)
    return pd.DataFrame(rows)

def test_sampled_pixels_are_pixels_of_the_files(table):
    p,y = sample_pixels(table, n=500)
    assert p.shape==(3,2000) and p.dtype==np.uint8 and y.shape==(2000,) and IGNORE not in y
    first = read_image(table.probs[0]).reshape(3,-1).T; lbl = read_image(table.label[0]).ravel()
    there = {(*map(int,q),int(l)) for q,l in zip(first, lbl) if l!=IGNORE}
    assert all((*map(int,q),int(l)) in there for q,l in zip(p[:,:500].T, y[:500]))
    np.testing.assert_array_equal(sample_pixels(table, n=500)[0], p)
    assert (sample_pixels(table, n=500, seed=1)[0]!=p).any()
    assert sample_pixels(table, n=10**6)[0].shape==(3,4*65*80)
    assert fit_temperature(table)==pytest.approx(2, rel=.1)

def test_files_that_can_not_be_used_are_left_out(table, tmp_path):
    write_image(tmp_path/'small.tif', np.zeros((70,79), np.uint8)); write_image(tmp_path/'four.tif', np.full((4,70,80), 64, np.uint8)); write_image(tmp_path/'high.tif', np.full((70,80), 3, np.uint8))
    (tmp_path/'no.tif').write_text('no image'); write_image(tmp_path/'zero.tif', np.zeros((3,70,80), np.uint8))
    good = [table.iloc[0].to_dict()]
    bad = [good[0]|d|dict(field=f'b{i}') for i,d in enumerate((dict(probs=None), dict(label=None), dict(label=str(tmp_path/'small.tif')), dict(label=str(tmp_path/'high.tif')), dict(probs=str(tmp_path/'no.tif')),
        dict(probs=str(tmp_path/'gone.tif')), dict(probs=str(tmp_path/'zero.tif')), dict(probs=str(tmp_path/'four.tif'))))]
    with pytest.warns(UserWarning, match='8 of 9 fields are left out') as told: p,_ = sample_pixels(pd.DataFrame(good+bad))
    assert p.shape[1]==65*80
    for why in ('probs=True','no label image','of one size','holds 3, but there are 3 classes','no.tif','gone.tif','add up to 1','has 4 classes, others have 3'): assert why in str(told[0].message), why
    with pytest.raises(FieldsError, match='no field has'): sample_pixels(pd.DataFrame(bad[:1]))
    with pytest.raises(FieldsError, match='is empty'): sample_pixels(table[:0])
    with pytest.raises(FieldsError, match="no column 'label'"): fit_temperature(table.drop(columns='label'))

# ---- confidence

def test_confidence_by_hand(rng):
    p = some_probs(rng); lbl = rng.integers(0, 2, p.shape[1:]).astype(np.uint8) # no nucleus
    lbl[rng.random(lbl.shape)<.3] = IGNORE
    sure = 1-scipy_entropy(p, axis=0)/np.log(3)
    u = (lbl==IGNORE).mean()
    want = np.mean([sure[lbl==0].mean(),sure[lbl==1].mean()])*(1-u/4)
    assert image_confidence(p, lbl)==pytest.approx(want, abs=1e-5)
    assert image_confidence(uint8(p), lbl)==pytest.approx(want, abs=.02)
    assert image_confidence(p)==pytest.approx(image_confidence(p, p.argmax(0)))
    assert image_confidence(p[[1,0,2]], np.where(lbl<2, 1-lbl, lbl))==pytest.approx(want, abs=1e-5) # names of classes do not matter
    spoilt = p.copy(); spoilt[:,lbl==IGNORE] = 1/3
    assert image_confidence(spoilt, lbl)==pytest.approx(want, abs=1e-5) # what can't be judged is not looked at
    assert image_confidence(p, np.full_like(lbl, IGNORE))==0
    assert image_confidence(np.eye(3)[rng.integers(0, 3, (9,9))].transpose(2,0,1))==pytest.approx(1, abs=1e-5)
    with pytest.raises(CellsegError, match='do not fit'): image_confidence(p, lbl.T)
    with pytest.raises(CellsegError, match='holds 7'): image_confidence(p, np.full_like(lbl, 7))

def field_files(folder, name, rng, sure, **kwargs):
    "A simulated field, and probabilities that are as sure as told of the truth"
    sim = simulate_field((256,320), int(rng.integers(1e9)), pixel_size=.65, **kwargs)
    p = np.full((3,*sim.label.shape), (1-sure)/2); np.put_along_axis(p, sim.label[None].astype(int), sure, 0)
    paths = {c:str(folder/f'{name}_{c}.tif') for c in ('brightfield','probs','prediction')}
    for c,img in zip(paths, (sim.brightfield,uint8(p),sim.label)): write_image(paths[c], img, **dict(pixel_size=.65) if c!='probs' else {})
    return dict(field=name)|paths

def test_reasons_name_what_was_done_to_a_field(tmp_path, rng):
    rows = [field_files(tmp_path, n, rng, sure, confluence=.6, **kw) for n,sure,kw in (('good',.97,{}), ('fine',.96,{}), ('ok',.97,{}), ('bubbly',.97,dict(bubbles=4)), ('blurred',.97,dict(defocus=.9)), ('unsure',.5,{}))]
    rows.append(rows[0]|dict(field='lost', probs=None))
    with pytest.warns(UserWarning, match='1 of 7 fields could not be judged'): done = field_confidences(pd.DataFrame(rows))
    again = image_again(done).set_index('field')
    assert list(again.index[:2])==['lost','unsure'] and set(again.index[2:4])=={'bubbly','blurred'}
    assert 'probs=True' in again.reason['lost'] and again.reason['unsure']=='unsure nearly everywhere'
    assert 'under bubbles' in again.reason['bubbly'] and 'out of focus?' in again.reason['blurred'] and again.reason['good']=='nothing stands out'
    np.testing.assert_allclose((done.opaque+done.blurred)[:6], done.unjudged[:6], atol=1e-6) # nothing is counted twice
    assert list(image_again(done, n=2).field)==['lost','unsure'] and len(image_again(done, below=again.confidence['unsure']+.01))==2
    assert list(image_again(done).columns[:3])==['field','confidence','reason']
    plain = field_confidences(pd.DataFrame(rows[:6]), look=False).set_index('field')
    assert plain.opaque.isna().all() and (plain.unjudged==0).all() and plain.confidence['bubbly']>done.set_index('field').confidence['bubbly']

def test_a_field_without_cells_and_one_that_is_all_spoilt(tmp_path):
    p = np.zeros((3,30,40)); p[0] = .98; p[1:] = .01
    write_image(tmp_path/'p.tif', uint8(p)); write_image(tmp_path/'l.tif', np.full((30,40), IGNORE, np.uint8)); write_image(tmp_path/'half.tif', np.repeat(np.uint8([[0,IGNORE]]), 20, 1).repeat(30, 0))
    t = pd.DataFrame(dict(field=['empty','spoilt','half'], probs=str(tmp_path/'p.tif'), prediction=[None,str(tmp_path/'l.tif'),str(tmp_path/'half.tif')]))
    again = image_again(field_confidences(t)).set_index('field')
    assert again.confidence['spoilt']==0 and again.reason.to_dict()==dict(spoilt='nothing can be judged', half="50% can't be judged; nothing but background found", empty='nothing but background found')
    assert again.confidence['half']==pytest.approx(again.confidence['empty']*.875, abs=1e-6)

def test_two_classes_and_other_sizes(tmp_path, rng):
    p = some_probs(rng, 2, (20,30))
    write_image(tmp_path/'p.tif', uint8(p)); write_image(tmp_path/'l.tif', np.zeros((20,31), np.uint8))
    t = pd.DataFrame(dict(field=['a'], probs=str(tmp_path/'p.tif')))
    out = field_confidences(t, classes=('background','nucleus'))
    assert out.confidence[0]==pytest.approx(image_confidence(p), abs=.02) and 'sure_nucleus' in out
    with pytest.raises(FieldsError, match='but there are 3 classes'): field_confidences(t)
    with pytest.raises(FieldsError, match='must have one size'): field_confidences(t.assign(prediction=str(tmp_path/'l.tif')), classes=('background','nucleus'))
    with pytest.raises(FieldsError, match='cannot be opened|no such file|could not|not exist|No such'): field_confidences(t.assign(probs='gone.tif'))

def test_it_ranks_fields_by_their_dice(rng):
    "A network that is unsure where it errs: rank correlation with the true Dice over 60 fields, whose error and confidence differ"
    conf,dice = [],[]
    for _ in range(60):
        truth = (rng.random((40,40))<rng.uniform(.1, .9)).astype(np.uint8); hard = rng.uniform(0, 1)
        z = rng.normal(0, 1, (2,40,40))*(1+3*hard)/2; np.put_along_axis(z, truth[None].astype(int), np.take_along_axis(z, truth[None].astype(int), 0)+4*(1-hard), 0)
        p = softmax(z/(1+hard)); lbl = p.argmax(0)
        dice.append(np.mean([2*((lbl==k)&(truth==k)).sum()/((lbl==k).sum()+(truth==k).sum()) for k in (0,1)])); conf.append(image_confidence(p, lbl))
    assert spearmanr(conf, dice).statistic>.7

def test_real_field_without_a_network(data):
    "On a real bright-field with debris: the artefacts are counted, whatever the probabilities"
    import tempfile
    from pathlib import Path
    path = data/'cellpainting_bf'/'r03c03f03p01-ch1sk1fk1fl1.tiff'
    img = read_image(path)
    with tempfile.TemporaryDirectory() as d:
        write_image(Path(d)/'p.tif', np.stack([np.full(img.shape, v, np.uint8) for v in (200,40,15)]))
        out = field_confidences(pd.DataFrame(dict(field=['real'], brightfield=[str(path)], probs=[str(Path(d)/'p.tif')])))
    assert 0<out.opaque[0]<.3 and out.unjudged[0]>=out.opaque[0]
