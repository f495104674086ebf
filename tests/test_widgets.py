"FieldComparer and explorers without a browser: what the comparer reads, sends, keeps in memory, refuses and saves; the lesson's cells for own images, on real ones"
import json, re, time, zlib
from pathlib import Path
import numpy as np, pandas as pd, pytest
from cellseg.cells import cell_instances
from cellseg.core import CellsegError, FieldsError, CLASSES, label_rgb
from cellseg.data import read_label
from cellseg.explorers import AugmentationExplorer, SamplerExplorer, ThresholdExplorer
from cellseg.fields import load_fields
from cellseg.io import read_grey, write_image
from cellseg.metrics import dice_scores
from cellseg.simulate import simulate_field, simulate_fields
from cellseg.widgets import FieldComparer, FieldLayers, ImageCache, level_knots, level_values, reduced, to_levels
import cellseg.widgets

@pytest.fixture(scope='module')
def fields(tmp_path_factory): return simulate_fields(tmp_path_factory.mktemp('fields'), 3, (150,210), seed=5, confluence=.5)

def ask(w, *wants):
    "What the browser gets for these wants: descriptions, and arrays or None"
    sent,w.send = [],lambda content,buffers=None: sent.append((content,buffers))
    w._message(w, dict(kind='pixels', view='v', wants=list(wants)), [])
    del w.send
    json.dumps([c for c,_ in sent], allow_nan=False) # as it goes to the browser
    return [(c,np.frombuffer(zlib.decompress(b[0]), np.uint8).reshape(c['h'],c['w']) if b else None) for c,b in sent]

def test_cache_never_holds_more_than_its_bound(rng):
    cache,store = ImageCache(5000),{k:np.full(rng.integers(1, 6000), k%256, np.uint8) for k in range(40)}
    for k in rng.integers(0, 40, 500):
        assert (cache.get(k, lambda: store[k])==k%256).all()
        assert cache.bytes==sum(a.nbytes for a in cache._kept.values())<=5000

def test_browsing_many_fields_stays_within_the_bound(fields, tmp_path):
    "Every layer of 60 fields, each with files of its own"
    rows = []
    for i in range(60):
        row = dict(field=f'f{i}')
        for c in ('brightfield','nuclei','cytoplasm','label'):
            row[c] = str(tmp_path/f'{i}_{c}.tif'); Path(row[c]).symlink_to(fields[c][i%3])
        rows.append(row)
    w = FieldComparer(pd.DataFrame(rows), 'label', cache=1e6)
    for i in range(60):
        w.field = i
        got = ask(w, *[dict(field=i, layer=l, most=64) for l in w.layers.layers])
        assert not any('message' in c for c,_ in got) and w.layers.cache.bytes<=1e6
    assert w.layers.cache.bytes>.5e6

def test_all_widgets_share_one_cache_and_read_changed_files_anew(fields, tmp_path, rng):
    p = tmp_path/'p.tif'
    preds = [str(p),None,None]
    write_image(p, np.zeros((150,210), np.uint8)); a = FieldComparer(fields, preds)
    assert (a.layers.read(0, 'prediction')==0).all()
    time.sleep(.02); write_image(p, np.ones((150,210), np.uint8)); b = FieldComparer(fields, preds)
    assert (b.layers.read(0, 'prediction')==1).all() and (a.layers.read(0, 'prediction')==1).all() and a.layers.cache is b.layers.cache
    for k in (40,90): # arrays of two widgets never take each other's place
        img = np.zeros((150,210), np.uint8); img[k:] = 2
        w = FieldComparer(fields, [img]*3)
        assert ((w.layers.cells(0, 'prediction')[0]>0)==(img==2)).all()

@pytest.mark.parametrize('dtype', ['uint8','uint16','int16','float32'])
def test_levels_keep_order_and_are_fine_where_pixels_are(rng, dtype):
    img = rng.gamma(3, 20, (200,260)).astype(dtype); img[3,5] = img.max()*1.0
    knots = level_knots(img)
    lev,val = to_levels(img, knots),level_values(knots)
    order = np.argsort(img, axis=None)
    assert (np.diff(lev.ravel()[order].astype(int))>=0).all() and (np.diff(val)>0).all()
    inside = (img>=knots[1])&(img<=knots[2])
    assert np.abs(val[lev]-img)[inside].max()<=.51*(knots[2]-knots[1])/207
    assert lev.min()==0 and lev.max()==255

def test_reduced_is_the_mean_of_squares(rng):
    img,f = rng.integers(0, 60000, (rng.integers(20,60),rng.integers(20,60))).astype(np.uint16),int(rng.integers(2,6))
    out = reduced(img, f)
    assert out.shape==tuple(-(-s//f) for s in img.shape)
    r,c = img.shape[0]//f-1,img.shape[1]//f-1
    assert out[r,c]==img[r*f:r*f+f,c*f:c*f+f].sum()//f**2
    lbl = (img%3).astype(np.uint8)
    assert reduced(lbl, f, codes=True)[r,c]==lbl[r*f+f//2,c*f+f//2]

def test_parts_fit_together(fields, rng):
    "A part of full resolution is what the file holds there"
    w = FieldComparer(fields)
    for _ in range(10):
        (a,b),(c,d) = (sorted(rng.integers(0, s, 2)) for s in (150,210))
        about,pix = ask(w, dict(field=1, layer='truth', factor=1, rows=[int(a),int(b)+1], cols=[int(c),int(d)+1]))[0]
        assert (pix==read_label(fields.label[1])[a:b+1,c:d+1]).all() and (about['row'],about['col'])==(a,c)
    about,pix = ask(w, dict(field=1, layer='brightfield', factor=2, rows=[10,51], cols=[0,210]))[0]
    back = np.array(about['values'])[pix]
    want = reduced(read_grey(fields.brightfield[1])[10:51], 2)
    assert np.abs(back-want).max()<=.51*np.diff(about['values']).max() and pix.shape==(21,105)

def test_dice_is_that_of_the_library(fields, rng):
    preds = [np.where(rng.random(l.shape)<.1*i, 0, l).astype(np.uint8) for i,l in enumerate(map(read_label, fields.label))]
    w = FieldComparer(fields, preds)
    w.score()
    for i,p in enumerate(preds): assert np.allclose(w.dice['prediction'][str(i)], dice_scores(p, read_label(fields.label[i])))
    assert FieldComparer(fields, preds, scores=w_scores(w)).field==2 # the worst

def w_scores(w): return pd.DataFrame([(f,c,d) for i,f in enumerate(w.fields.field) for c,d in zip(CLASSES, w.dice['prediction'][str(i)])], columns=['field','class','dice'])

def test_scoring_is_done_a_few_at_a_time(fields):
    w = FieldComparer(fields, 'label', field=1)
    w.score(0); assert list(w.dice['prediction'])==['1'] and not w.scored # the field shown first
    w.score(0); w.score(0); assert w.scored

def test_click_tells_what_the_files_hold(fields, rng):
    w = FieldComparer(fields, dict(a='label', b=[None]*3), probs=dict(a=[np.stack([read_label(p)==k for k in range(3)]).astype(np.uint8)*255 for p in fields.label]), field=2)
    lbl = read_label(fields.label[2]); nuclei,cells = cell_instances(lbl, pixel_size=.345)
    for r,c in zip(rng.integers(0,150,20).tolist(), rng.integers(0,210,20).tolist()):
        p = w.pick(r, c)
        assert p['values']['nuclei']==read_grey(fields.nuclei[2])[r,c] and p['classes']=={'truth':CLASSES[lbl[r,c]],'prediction a':CLASSES[lbl[r,c]]}
        assert p['probs']['a']==[float(lbl[r,c]==k) for k in range(3)]
        assert p['cell'].get('truth', 0)==cells[r,c] and p['nucleus'].get('truth', False)==(nuclei[r,c]>0)
    json.dumps(w.place, allow_nan=False)
    with pytest.raises(CellsegError, match='outside'): w.pick(-1, 0)

def test_classes_without_a_nucleus_have_no_cells(fields):
    w = FieldComparer(fields, 'label', classes=('background','body','core'))
    r,c = np.argwhere(read_label(fields.label[0])==2)[0].tolist()
    p = w.pick(r, c)
    assert p['classes']['truth']=='core' and p['cell']=={}==p['nucleus']

def test_missing_and_broken_say_so_and_the_rest_works(fields, tmp_path):
    cut,other,colour = tmp_path/'cut.tif',tmp_path/'other.tif',tmp_path/'colour.png'
    cut.write_bytes(Path(fields.brightfield[0]).read_bytes()[:5000]); write_image(other, np.zeros((75,105), np.uint8)); write_image(colour, np.zeros((3,150,210), np.uint8))
    f = fields.assign(prediction=[None,str(other),fields.label[2]], nuclei=[str(tmp_path/'gone.tif'),None,str(colour)])
    f.loc[0,'brightfield'] = str(cut)
    f = f[[*f.columns[f.columns!='brightfield'],'brightfield']]
    f.loc[2,'prediction'] = str(other); f.loc[1,'prediction'] = fields.label[1] # field 2: another size
    w = FieldComparer(f)
    got = {l:ask(w, dict(field=0, layer=l, most=999))[0] for l in w.layers.layers}
    assert 'cut.tif' in got['brightfield'][0]['message'] and 'gone.tif: no such file' in got['nuclei'][0]['message']
    assert got['prediction'][0]['message']=='this field has no prediction' and got['truth'][1].shape==(150,210)==got['cytoplasm'][1].shape
    w.field = 1; assert w.state['messages']=={'nuclei':'this field has no nuclei image'}
    w.field = 2; assert '(75, 105) and brightfield (150, 210)' in w.state['messages']['prediction'] and 'colour' in w.state['messages']['nuclei']
    assert w.state['dice']=={'prediction':dict.fromkeys(CLASSES)}
    for i in range(3): w.field = i; assert w.picture()[:2]==b'\xff\xd8' # the picture without a browser

def test_a_whole_table_of_another_size_is_refused(fields):
    with pytest.raises(CellsegError, match=r'\(10, 20\) and brightfield \(150, 210\)'): FieldComparer(fields, [np.zeros((10,20), np.uint8)]*3)

@pytest.mark.parametrize('make,words', [
    (lambda f: FieldComparer(f[:0]), 'at least one row'), (lambda f: FieldComparer(f.drop(columns='field')), 'column `field`'),
    (lambda f: FieldComparer(f.assign(field='a')), "two fields are called 'a'"), (lambda f: FieldComparer(f, 'nope'), "no column 'nope'"),
    (lambda f: FieldComparer(f, [1,2,3]), 'by its path or as an array'), (lambda f: FieldComparer(f, pd.DataFrame(dict(a=[1]))), 'needs columns field and prediction'),
    (lambda f: FieldComparer(f, 'label', scores=dict(x=pd.DataFrame())), "scores of 'x'"), (lambda f: FieldComparer(f, channels=['dic']), "no column 'dic'"),
    (lambda f: FieldComparer(f, field=7), 'no field 7'), (lambda f: FieldComparer(f, base='wall'), "base can't be 'wall'"), (lambda f: FieldComparer(f, truth='gold'), "no column 'gold'")])
def test_bad_input_is_refused(fields, make, words):
    with pytest.raises(CellsegError, match=re.escape(words)): make(fields)

def test_a_bad_browser_message_is_told_not_raised(fields):
    w = FieldComparer(fields)
    w._message(w, dict(kind='verdict', field=99, verdict='accept'), []); assert 'no field 99' in w.status
    w._message(w, dict(kind='verdict', field=0, verdict='<b>'), []); assert "not '<b>'" in w.status and w.fields.verdict.isna().all()
    w._message(w, dict(kind='pick', field=0, row=9999, col=0), []); assert 'outside' in w.status
    for bad in (dict(field=0, layer='../secret'), dict(field=-1, layer='truth'), dict(field=0, layer='truth', rows=['a','b']), dict(field=0, layer='truth', factor=0), dict(field=0, layer='truth', rows=[500,600])):
        assert ask(w, bad)[0][0]['message']

def test_verdicts_are_saved_and_found_again(fields, tmp_path):
    out,note = tmp_path/'new'/'judged.csv','=1+1, "quoted"\n<img src=x onerror=alert(1)> ü'
    w = FieldComparer(fields, save_to=out)
    w.judge('accept'); w.judge('exclude', note, 'sim0002'); w.judge(note='only a note', field=1); w.judge(None)
    saved = load_fields(out)
    assert saved.verdict.tolist()==[None,None,'exclude'] and saved.note.tolist()==[None,'only a note',note]
    assert saved.brightfield.tolist()==fields.brightfield.tolist() and 'verdict' not in fields
    again = FieldComparer(fields[::-1], save_to=out)
    assert again.fields.verdict.tolist()==['exclude',None,None] and again.verdicts=={'0':['exclude',note],'1':[None,'only a note']}
    assert [p.name for p in out.parent.iterdir()]==['judged.csv']

def test_a_verdict_that_cannot_be_saved_is_told(fields, tmp_path):
    (tmp_path/'file').write_text('')
    w = FieldComparer(fields, save_to=tmp_path/'file'/'x.csv')
    with pytest.raises(CellsegError, match='could not be written'): w.judge('accept')
    w._message(w, dict(kind='verdict', field=1, verdict='accept'), []); assert 'could not be written' in w.status
    assert w.fields.verdict.tolist()==['accept','accept',None] # nothing is lost as long as the notebook lives

def test_the_page_makes_no_markup_and_fetches_nothing():
    "Text reaches the page by textContent, values and canvas text alone"
    js = (Path(cellseg.widgets.__file__).parent/'comparer.js').read_text(encoding='utf-8')
    code = re.sub(r'//.*', '', js)
    assert not re.findall(r'innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|\beval\b|Function\(|fetch\(|XMLHttpRequest|import |import\(|WebSocket|https?:', code)
    assert 'textContent' in code

def test_saved_output_holds_a_picture_and_no_file_names(fields):
    w = FieldComparer(fields, 'label')
    data,_ = w._repr_mimebundle_()
    assert data['image/jpeg'][:2]==b'\xff\xd8' and 'application/vnd.jupyter.widget-view+json' in data
    assert str(Path(fields.label[0]).parent) not in str({k:v for k,v in data.items() if k!='image/jpeg'})+json.dumps(w.config)

# real images

def test_cell_painting_field(data):
    d = data/'cellpainting_bf'
    from cellseg.labels import fluorescence_labels
    paths = {c:next(d.glob(f'*-{k}sk*')) for c,k in (('brightfield','ch1'),('cytoplasm','ch3'),('nuclei','ch5'))}
    lbl = fluorescence_labels(read_grey(paths['nuclei']), read_grey(paths['cytoplasm']))
    w = FieldComparer(pd.DataFrame([dict(field='r03c03f03', **{k:str(p) for k,p in paths.items()})]), dict(shifted=[np.roll(lbl, 5, 0)]), truth=None)
    assert w.config['panels']==['bright-field','fluorescence','prediction shifted'] and w.state['messages']=={} and w.state['dice']=={}
    about,pix = ask(w, dict(field=0, layer='brightfield', most=1024))[0]
    assert about['factor']==2 and pix.shape==(540,540) and 40<pix.mean()<215 and pix.std()>20
    r,c = np.argwhere(np.roll(lbl, 5, 0)==2)[1000].tolist()
    assert w.pick(r, c)['cell']['prediction shifted']>0 and w.place['nucleus']['prediction shifted']

def test_brifiseg_has_two_classes(data, rng):
    rows = [dict(field=p.name[:8], brightfield=str(p), label=str(p).replace('_BF','_nuclei')) for p in sorted((data/'brifiseg').glob('*_BF.tif'))]
    classes,f = ('background','nucleus'),pd.DataFrame(rows)
    preds = [np.roll(read_label(p, 2), int(k), 1) for p,k in zip(f.label, rng.permutation(5)*4)]
    w = FieldComparer(f, preds, classes=classes)
    w.score()
    want = [dice_scores(p, read_label(l, 2), 2).mean() for p,l in zip(preds, f.label)]
    assert np.allclose([np.mean(w.dice['prediction'][str(i)]) for i in range(5)], want)
    r,c = np.argwhere(read_label(f.label[0], 2)==1)[50].tolist()
    assert w.pick(r, c)['classes']['truth']=='nucleus' and w.place['cell']['truth']==cell_instances(read_label(f.label[0], 2), classes=classes).cells[r,c]
    for l in ('brightfield','truth','prediction'): assert 'message' not in ask(w, dict(field=4, layer=l, most=512))[0][0]

# the lesson's cells for the reader's own images, on real ones

LESSON = Path(__file__).parents[1]/'nbs'/'course'/'05_look_at_your_predictions.ipynb'

def own_cells(part):
    "Code of the lesson's cells that are not run there: those after the cell that names the folder"
    cells = [''.join(c['source']) for c in json.loads(LESSON.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']
    cells = [c for c in cells if c.startswith('#| eval: false\n')]
    first = [i for i,c in enumerate(cells) if "\nfolder = Path('" in c]
    assert first[0]==0 and len(first)==2
    return cells[first[part]+1:[*first,None][part+1]]

def run_own(part, folder, work):
    "What there is by name after these cells"
    names = dict(folder=folder, work=work)
    exec('from cellseg.all import *', names)
    for c in own_cells(part): exec(compile(c, 'lesson', 'exec'), names)
    return names

def test_lesson_on_stained_images(data, tmp_path):
    n = run_own(0, data/'cellpainting_bf', tmp_path)
    c,t,w,a,lbl = n['c'],n['t'],n['w'],n['a'],read_label(n['fields'].label[0])
    assert {type(o).__name__ for o in (c,t,w,a)}=={'FieldComparer','ThresholdExplorer','SamplerExplorer','AugmentationExplorer'}
    assert (c.state['panels'],c.state['messages'],c.state['shape'],c.state['id'])==(['bright-field','fluorescence','truth'],{},[1080,1080],'03_03_03_01')
    r,k = np.argwhere(lbl==1)[len(lbl)].tolist()
    assert c.pick(r, k)['classes']=={'truth':'cytoplasm'} and c.place['nucleus'].get('truth', False)==False
    share = np.bincount(lbl.ravel(), minlength=3)/lbl.size
    assert (share>.01).all() and np.abs(share-list(t.state['share'].values())).max()<.03 and (t.label()==lbl).mean()>.99
    t.nuclei += .5
    assert t.state['method']=='by hand' and t.state['share']['nucleus']<share[2]
    np.testing.assert_allclose(w.state['shares'].fields, share, atol=1e-9)
    assert np.abs(w.state['shares'].centres-1/3).max()<.06
    assert (a.state['labels'][0]==label_rgb(lbl[428:652,428:652])).all() and a.state['images'].shape==(2,224,224) # the middle
    c.judge('accept')
    assert load_fields(tmp_path/'looked.csv').verdict.tolist()==['accept']

def test_lesson_on_masked_images(data, tmp_path, capsys):
    n = run_own(1, data/'brifiseg', tmp_path)
    c,m,fields = n['c'],n['monitor'],n['fields']
    assert (m.state['epoch'],len(m.state['history']))==(2,2) and m.state['label'].shape==(384,384) and set(np.unique(m.state['label']))<={0,1}
    held = fields[fields.fold==0].iloc[0]
    assert (m.view.truth==read_label(held.label, 2)[64:448,64:448]).all() and (tmp_path/'masked'/'training.png').stat().st_size>10_000
    assert c.state['panels']==['bright-field','truth','prediction','difference'] and c.state['messages']=={}
    c.score()
    for i,f in enumerate(fields.itertuples()): assert np.allclose(c.dice['prediction'][str(i)], dice_scores(read_label(f.prediction, 2), read_label(f.label, 2), 2))
    c.field = held.field
    r,k = np.argwhere(cell_instances(read_label(held.label, 2), classes=n['classes']).cells>0)[9].tolist()
    assert c.pick(r, k)['classes']['truth']=='nucleus' and c.place['cell']['truth']>0 and c.state['id']==held.field

# explorers draw into the axes they have

def test_a_moved_explorer_shows_what_a_new_one_shows(rng):
    "Nothing of an earlier picture stays: after many moves each pixel is as if it had begun with these controls"
    f,g = (simulate_field(s, seed=int(rng.integers(10**6)), confluence=.5) for s in ((260,300),(250,340)))
    t = ThresholdExplorer(f.nuclei, f.cytoplasm)
    lo,hi = t.controls['nuclei'].min,t.controls['nuclei'].max
    kinds = [(lambda: SamplerExplorer([f.label,g.label], size=64, n=200), dict(weight2=lambda: float(rng.integers(1, 9)), field=lambda: int(rng.integers(2)), seed=lambda: int(rng.integers(99)))),
        (lambda: AugmentationExplorer(f.brightfield, f.label, size=128), dict(sigma=lambda: float(rng.integers(0, 40)), mesh=lambda: int(rng.integers(1, 8)), grid=lambda: bool(rng.integers(2)))),
        (lambda: ThresholdExplorer(f.nuclei, f.cytoplasm), dict(method=lambda: str(rng.choice(['gmm','otsu','edges'])), nuclei=lambda: float(rng.uniform(.7*lo+.3*hi, .5*lo+.5*hi)), plain=lambda: bool(rng.integers(2))))]
    for make,moves in kinds:
        w = make()
        for name in rng.permutation([*moves]*2).tolist(): w.set(**{name:moves[name]()})
        now = {k:c.value for k,c in w.controls.items()}
        if now.get('method','by hand')!='by hand': now = {k:v for k,v in now.items() if k not in ('nuclei','cytoplasm')} # these follow the method
        new = make(); new.set(**now)
        np.testing.assert_array_equal(w._pixels, new._pixels, str(now))
