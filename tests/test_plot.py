"Figures, by what they draw: data in the artists, with fresh random inputs each time"
import warnings
import numpy as np, pandas as pd
import pytest, torch
import matplotlib; matplotlib.use('agg')
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from sklearn.calibration import calibration_curve
from fastai.torch_core import TensorImage,TensorImageBase,TensorMask
from fastai.vision.augment import RandTransform
from cellseg.augment import RandomDihedral,RandomOptics,RandomWarp,dihedral,paper_augment
from cellseg.core import CLASSES,IGNORE,CellsegError,FieldsError,ImageError,class_colours,label_rgb
from cellseg.io import read_grey,write_image
from cellseg.metrics import confusion
from cellseg.plot import (MISTAKES,composite,drawn_shares,find_contrast,for_screen,plot_calibration,plot_confusion,plot_history,plot_sampling,plot_scores,
    scale_bar,show_augmentation,show_comparison,show_contact_sheet,show_field)
from cellseg.charts import calibration_bins,calibration_error
from cellseg.sampling import PatchSampler
from scipy.ndimage import gaussian_filter,map_coordinates
COLOURS = class_colours()

@pytest.fixture(autouse=True)
def closed():
    "Figures are closed, and nothing was said about them"
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield
        for n in plt.get_fignums(): plt.figure(n).canvas.draw()
    plt.close('all')

def blobs(rng, shape, n=3, sigma=6): return np.stack([gaussian_filter(rng.normal(size=shape), sigma) for _ in range(n)]).argmax(0).astype(np.uint8)
def grey(rng, shape): return rng.integers(0, 2**rng.integers(8, 17), shape).astype(np.uint16)
def hexes(colours): return [to_hex(c).upper() for c in colours]
def bars(ax): return [p for p in ax.patches if p.get_gid()=='scale bar']
def notes(ax): return [t.get_text() for t in ax.texts if t.get_gid()=='contrast']

# ---- contrast

def test_contrast_counts_what_is_clipped(rng):
    img = (rng.gamma(.5, 500, rng.integers(40, 900, 2))).astype(rng.choice(['uint16','float32','float64']))
    low,high = np.sort(rng.uniform(0, 100, 2))
    c = find_contrast(img, low, high)
    assert c.black<=c.white
    assert c.darker==pytest.approx((img<c.black).sum()/img.size) and c.brighter==pytest.approx((img>c.white).sum()/img.size)
    shown = for_screen(img, low, high)
    assert shown.min()>=0 and shown.max()<=1
    if c.white>c.black: assert (shown[img<=c.black]==0).all() and (shown[img>=c.white]==1).all()

def test_what_stands_below_a_picture_is_what_its_axes_clip(rng):
    "The caption against the picture itself: pixels at the ends of its colours"
    img = (300+rng.gamma(1, 1000, (300,200))).astype(np.uint16)
    img = np.minimum(img, int(np.percentile(img, 98))) # saturated: none of it is brighter than white
    ax, = show_field(dict(brightfield=img))
    shown = ax.images[0].norm(ax.images[0].get_array())
    lo,hi = ax.images[0].get_clim()
    assert notes(ax)==[f'{lo:.0f} to {hi:.0f}\nclipped {100*(img<lo).mean():.1f} % dark, 0 % bright']
    assert (img<lo).any() and hi==img.max() and (shown[img<=lo]==0).all() and (shown[img>=hi]==1).all()

@pytest.mark.parametrize('img', [np.zeros((9,9), np.uint8), np.full((9,9), 300, np.uint16), np.eye(9)>0, np.array([[3.]])])
def test_flat_and_tiny_images_are_shown(img):
    assert np.isfinite(for_screen(img)).all()
    ax, = show_field(dict(brightfield=img))
    plt.gcf().canvas.draw()

def test_a_rare_bright_spot_is_seen(rng):
    img = np.zeros((200,200), np.uint16); img[5,:rng.integers(1, 30)] = 900
    assert for_screen(img).max()==1 and find_contrast(img).brighter==0

# ---- scale bar

@pytest.mark.parametrize('down', [True,False])
def test_scale_bar_is_as_long_as_it_says(rng, down):
    h,w = rng.integers(20, 3000, 2)
    px = float(10**rng.uniform(-3, 2))
    _,ax = plt.subplots()
    ax.imshow(np.zeros((h,w), np.uint8), origin='upper' if down else 'lower')
    assert scale_bar(ax, px) is ax
    bar,text = bars(ax)[0],ax.texts[0].get_text()
    number,unit = text.split(' ')
    length = float(number)*{'nm':1e-3,'µm':1,'mm':1e3}[unit]
    assert bar.get_width()*px==pytest.approx(length, rel=1e-5)
    assert .09*w<bar.get_width()<=.2501*w # a round length of up to a quarter
    assert number.strip('0.') in ('1','2','5')
    x,y = sorted(ax.get_xlim()),sorted(ax.get_ylim())
    box = bar.get_bbox()
    assert x[0]<box.xmin<box.xmax<x[1] and y[0]<min(box.y0,box.y1) and max(box.y0,box.y1)<y[1]
    assert bar.get_window_extent().y1<ax.bbox.y0+ax.bbox.height/4 # at the bottom, whichever way rows count
    assert ax.texts[0].get_window_extent().y0>=bar.get_window_extent().y0

@pytest.mark.parametrize('px', [0,-1,None,float('nan'),float('inf')])
def test_scale_bar_refuses_what_is_no_pixel_size(px):
    _,ax = plt.subplots()
    with pytest.raises(CellsegError, match='pixel_size'): scale_bar(ax, px)

# ---- one field

def test_field_shows_what_it_has(rng, tmp_path):
    shape = tuple(rng.integers(60, 150, 2))
    imgs = dict(brightfield=grey(rng, shape), nuclei=grey(rng, shape), cytoplasm=grey(rng, shape), label=blobs(rng, shape), prediction=blobs(rng, shape))
    has = [k for k in imgs if rng.random()<.6] or ['nuclei']
    px = float(rng.uniform(.1, 2))
    for k in has: write_image(tmp_path/f'{k}.tif', imgs[k], pixel_size=px)
    row = pd.Series(dict(field='$\\frac$ <img onerror=alert(1)>', well='A01') | {k:str(tmp_path/f'{k}.tif') if k in has else rng.choice([None,np.nan]) for k in imgs})
    axs = show_field(row)
    assert [ax.get_title() for ax in axs]==['bright-field' if k=='brightfield' else k for k in has]
    for ax,k in zip(axs, has):
        want = label_rgb(imgs[k]) if k in ('label','prediction') else imgs[k]
        np.testing.assert_array_equal(ax.images[0].get_array(), want)
        assert ax.images[0].get_interpolation()=='nearest' or k in ('brightfield','nuclei','cytoplasm')
    for ax,k in zip(axs, has):
        if k in ('nuclei','cytoplasm'): assert hexes([ax.images[0].cmap(1.)])==[COLOURS[dict(nuclei='nucleus', cytoplasm='cytoplasm')[k]]]
    assert [len(bars(ax)) for ax in axs]==[1]+[0]*(len(has)-1)
    assert bars(axs[0])[0].get_width()*px==pytest.approx(float(axs[0].texts[-1].get_text().split()[0]), rel=1e-4)
    assert axs[0].figure.get_suptitle()==row.field # as it is, no formula

def test_broken_and_missing_files_show_their_message(rng, tmp_path):
    img = grey(rng, (80,100))
    write_image(tmp_path/'b.tif', img); write_image(tmp_path/'l.tif', np.full((80,100), 7, np.uint8))
    (tmp_path/'n.tif').write_bytes(rng.bytes(50))
    axs = show_field(dict(nuclei=tmp_path/'n.tif', brightfield=tmp_path/'b.tif', cytoplasm=tmp_path/'$gone$.tif', label=tmp_path/'l.tif', prediction=img[:50].astype(np.uint8)))
    said = [' '.join(t.get_text() for t in ax.texts).replace('\n', ' ') for ax in axs]
    np.testing.assert_array_equal(axs[0].images[0].get_array(), img)
    assert 'n.tif is not an image' in said[1] and '$gone$.tif: no such file' in said[2] and 'label 7' in said[3] and '(50, 100), brightfield is (80, 100)' in said[4]
    assert not any(str(tmp_path) in s for s in said) and not any(ax.images for ax in axs[1:])
    plt.gcf().canvas.draw() # '$' is no formula
    only = show_field(dict(field='f', brightfield=tmp_path/'gone.tif'))
    assert 'no such file' in only[0].texts[0].get_text().replace('\n', ' ')

def test_field_is_refused_in_words(rng):
    t = pd.DataFrame(dict(field=['a','b'], brightfield=[None,None]))
    with pytest.raises(FieldsError, match='this table has 2'): show_field(t)
    with pytest.raises(FieldsError, match='nothing to show'): show_field(t.iloc[0])
    with pytest.raises(FieldsError, match="no 'phase'"): show_field(t.iloc[0], ['phase'])

def test_channels_of_other_kinds_are_shown_by_name(rng):
    a,b = grey(rng, (30,40)),grey(rng, (30,40))
    axs = show_field(dict(phase=a, dic=b, brightfield=b), ['dic','phase'])
    assert [ax.get_title() for ax in axs]==['dic','phase']
    np.testing.assert_array_equal(axs[1].images[0].get_array(), a)

# ---- side by side

def test_comparison_draws_its_data(rng):
    shape = tuple(rng.integers(50, 120, 2))
    b,n,c,t,p = grey(rng, shape),grey(rng, shape),grey(rng, shape),blobs(rng, shape),blobs(rng, shape)
    t[:5] = IGNORE
    axs = show_comparison(b, t, p, n, c, pixel_size=.5)
    np.testing.assert_array_equal(axs[0].images[0].get_array(), b)
    np.testing.assert_array_equal(axs[1].images[0].get_array(), composite(n, c))
    np.testing.assert_array_equal(axs[3].images[0].get_array(), label_rgb(p))
    d = axs[4].images[0].get_array()
    for what,where in dict(missed=(t>0)&(p==0), invented=(t==0)&(p>0), wrong_class=(t>0)&(p>0)&(t!=p)).items():
        got = (d==[int(MISTAKES[what][i:i+2], 16) for i in (1,3,5)]).all(-1)
        np.testing.assert_array_equal(got, where&(t!=IGNORE))
    assert len(bars(axs[0]))==1 and not any(len(bars(a)) for a in axs[1:])
    assert len(notes(axs[0]))==len(notes(axs[1]))==1 and 'nuclei' in notes(axs[1])[0] and not notes(axs[2])
    for other in (t[1:],t[:,1:]):
        with pytest.raises(CellsegError, match=r'prediction is \(.*truth is|truth is \(.*brightfield is'): show_comparison(b, other, p)

def test_given_axes_are_used_and_no_figure_is_made(rng, tmp_path):
    shape = (70,90); b,t,p = grey(rng, shape),blobs(rng, shape),blobs(rng, shape)
    scores = pd.DataFrame(dict(field='f', **{'class':CLASSES}, dice=rng.random(3)))
    fig,axs = plt.subplots(4, 4)
    before = plt.get_fignums()
    for got,want in ((show_field(dict(brightfield=b, label=t), axs=axs[0]),axs[0,:2]), (show_comparison(b, t, p, axs=axs[1]),axs[1]), (plot_sampling(PatchSampler([t], 32), axs=axs[2,:2]),axs[2,:2]),
        (show_augmentation(RandomDihedral(), b, size=32, n=3, axs=axs[3]),axs[3]), (plot_history(pd.DataFrame(dict(epoch=[0], train_loss=[1.])), axs=axs[0,2:]),axs[0,2:]),
        (plot_scores(scores, axs[2,2]),axs[2,2]), (plot_confusion(confusion(p, t), ax=axs[2,3]),axs[2,3])):
        assert list(np.ravel(got))==list(np.ravel(want))
    assert plt.get_fignums()==before

def test_contact_sheet_has_bars_where_the_scale_is_known(rng, tmp_path):
    rows = []
    for i in range(3):
        r = dict(field=f'f{i}')
        for c in ('brightfield','nuclei'): write_image(p := tmp_path/f'{i}{c}.tif', grey(rng, (96,130)), pixel_size=.5 if i<2 else None); r[c] = str(p)
        rows.append(r)
    axs = show_contact_sheet(pd.DataFrame(rows), columns=3)
    assert [len(bars(ax)) for ax in axs.flat]==[1,1,0]
    assert bars(axs.flat[0])[0].get_width()*.5==pytest.approx(float(axs.flat[0].texts[0].get_text().split()[0]))
    assert 'clipped' in axs.flat[0].figure.get_supxlabel()

# ---- patches

@pytest.mark.parametrize('fields', [1,3])
def test_sampling_draws_where_patches_are(rng, fields):
    labels = [blobs(rng, tuple(rng.integers(90, 200, 2))) for _ in range(fields)]
    labels[0][:7,:9] = IGNORE
    size,seed,n,which = int(rng.integers(8, 80)),int(rng.integers(1000)),2000,int(rng.integers(fields))
    weights = rng.dirichlet((1,1,1))
    s = PatchSampler(labels, size, weights)
    state = s.rng.bit_generator.state
    axs = plot_sampling(s, n, which, seed=seed)
    assert s.rng.bit_generator.state==state
    p = PatchSampler(labels, size, weights, seed).draw(n)
    here = p[p['field']==which]
    heat = axs[0].images[0].get_array()
    (left,right,bottom,top),(h,w) = axs[0].images[0].get_extent(),labels[which].shape
    assert (left,right,bottom,top)==(-.5,w-.5,h-.5,-.5)
    want = np.zeros(heat.shape)
    at = [np.minimum(((here[k]+(size-1)/2+.5)*m/M).astype(int), m-1) for k,m,M in zip(('row','col'), heat.shape, (h,w))]
    np.add.at(want, tuple(at), 1)
    assert heat.sum()==len(here) and np.abs(heat-want).sum()<=.02*len(here) # but for those on a line
    counts = np.bincount(np.concatenate([l.ravel() for l in labels]), minlength=256)[:3]
    heights = np.array([[b.get_height() for b in c] for c in axs[1].containers])
    np.testing.assert_allclose(heights[:,0], counts/counts.sum(), atol=1e-9)
    np.testing.assert_allclose(heights[:,1], np.bincount(p['cls'], minlength=3)/n, atol=1e-9)
    inside = sum(np.bincount(labels[f][r:r+size,c:c+size].ravel(), minlength=256)[:3] for f,r,c,_ in p[:100])
    np.testing.assert_allclose(heights[:,2], inside/inside.sum(), atol=1e-9)
    assert hexes([c[0].get_facecolor() for c in axs[1].containers])==[COLOURS[c] for c in CLASSES]
    bottoms = np.array([[b.get_y() for b in c] for c in axs[1].containers])
    np.testing.assert_allclose(bottoms[1:], np.cumsum(heights, 0)[:-1], atol=1e-9)

def test_outlines_lie_on_the_edges_of_classes(rng):
    lbl = np.zeros((100,120), np.uint8); r,c = rng.integers(10, 40, 2)
    lbl[r:r+40,c:c+50] = 1; lbl[r+10:r+20,c+10:c+30] = 2
    ax = plot_sampling(PatchSampler([lbl], 20), 100)[0]
    boxes = {to_hex(k.get_edgecolor()[0]).upper():np.concatenate([p.vertices for p in k.get_paths()]) for k in ax.collections}
    assert set(boxes)=={COLOURS['cytoplasm'],COLOURS['nucleus']}
    v = boxes[COLOURS['nucleus']]
    np.testing.assert_allclose([v.min(0),v.max(0)], [[c+9.5,r+9.5],[c+29.5,r+19.5]])

def _painted(shape, step, at, size):
    "Dark image with bright lines between the rows and columns of the patch at `at`, where the grid's lines are"
    img = np.zeros(shape)
    for k in range(0, size+1, step):
        for ax,a in enumerate(at):
            line = np.s_[a+k-1:a+k+1]
            img[(line,slice(None))[::1 if ax==0 else -1]] = 1
    return gaussian_filter(img, .7)

@pytest.mark.parametrize('make', [lambda: RandomDihedral(), lambda: RandomWarp(64, sigma=6), lambda: paper_augment(64, sigma=4), lambda: [RandomWarp(64, sigma=6),RandomOptics(blur=0, noise=0)]])
def test_the_grid_goes_with_the_image(rng, make):
    "Lines painted into the image and the grid's lines over it lie on each other after every augmentation"
    size,step,at = 64,16,(30,40)
    img = _painted((140,150), step, at, size)
    axs = show_augmentation(make(), img, n=4, size=size, at=at, grid=step, seed=int(rng.integers(10**6)))
    for ax in axs[0]:
        shown = np.asarray(ax.images[0].get_array()); shown = (shown-shown.min())/np.ptp(shown)
        lines = [p.vertices for c in ax.collections for p in c.get_paths() if len(p.vertices)>1]
        xy = np.array([a+t*(b-a) for v in lines for a,b in zip(v, v[1:]) for t in (0,.25,.5,.75)]) # and between its corners
        xy = xy[((xy>3)&(xy<size-4)).all(1)]
        assert len(xy)>200
        on = map_coordinates(shown, xy[:,::-1].T, order=1)
        assert np.quantile(on, .05)>.45 # bright under (nearly) all of the grid
        assert (shown<.2).mean()>.5      # which is not so elsewhere

def test_augmentation_is_the_transforms_own_and_leaves_it_alone(rng):
    img,lbl = gaussian_filter(rng.normal(size=(200,220)), 2),blobs(rng, (200,220))
    t,seed = RandomWarp(96, sigma=9, seed=4),int(rng.integers(10**6))
    state,numpy_state,torch_state = t.rng.bit_generator.state,np.random.get_state()[1].copy(),torch.get_rng_state()
    a,b = (show_augmentation(t, img, lbl, n=2, seed=seed) for _ in range(2))
    for x,y in zip(a.flat, b.flat): np.testing.assert_array_equal(x.images[0].get_array(), y.images[0].get_array())
    assert t.rng.bit_generator.state==state and (np.random.get_state()[1]==numpy_state).all() and (torch.get_rng_state()==torch_state).all()
    own = RandomWarp(96, sigma=9, seed=seed); m = own.margin
    big = torch.from_numpy(np.pad(lbl, m, constant_values=IGNORE)[52:52+96+2*m,62:62+96+2*m])
    _,want = own((TensorImage(torch.zeros(2,1,*big.shape)),TensorMask(big.expand(2,-1,-1))), split_idx=0)
    for i in (0,1): np.testing.assert_array_equal(a[1,i+1].images[0].get_array(), label_rgb(want[i].numpy()))
    other = show_augmentation(t, img, lbl, n=2, seed=seed+1)
    assert any((x.images[0].get_array()!=y.images[0].get_array()).any() for x,y in zip(a.flat, other.flat))

class Jolt(RandTransform):
    "A transform with no generator of its own"
    order = 5
    def encodes(self, x:TensorImageBase): return x+torch.rand(1)*np.random.rand()

def test_transforms_without_a_generator_are_seeded_too(rng):
    img,seed,state = rng.normal(size=(50,50)),int(rng.integers(10**6)),torch.get_rng_state()
    a,b,c = (show_augmentation([RandomDihedral(),Jolt(p=1.)], img, n=1, size=40, seed=s)[0,1].images[0].get_array() for s in (seed,seed,seed+1))
    assert (a==b).all() and (a!=c).any() and (torch.get_rng_state()==state).all()

def test_dihedral_labels_are_turned(rng):
    lbl,seed = blobs(rng, (60,70)),int(rng.integers(10**6))
    axs = show_augmentation(RandomDihedral(), rng.normal(size=(60,70)), lbl, n=3, size=32, at=(9,11), seed=seed)
    ks = np.random.default_rng(seed).integers(8, size=3)
    for ax,k in zip(axs[1,1:], ks): np.testing.assert_array_equal(ax.images[0].get_array(), label_rgb(dihedral(torch.from_numpy(lbl[9:41,11:43]), int(k)).numpy()))

# ---- numbers

def some_scores(rng, n, kinds):
    rows = [(f'f{i}',c,k,rng.uniform(.2, 1) if rng.random()<.9 else np.nan) for k in kinds for i in range(n) for c in CLASSES]
    return pd.DataFrame(rows, columns=['field','class','network','dice'])

@pytest.mark.parametrize('kinds', [['unet'],['unet','$tiramisu$'],['a','b','c','d','e']])
def test_scores_draw_every_field(rng, kinds):
    s = some_scores(rng, int(rng.integers(2, 12)), kinds)
    ax = plot_scores(s, hue='network')
    dots,means = ax.collections[:2]
    at,face = dots.get_offsets(),np.array(hexes(dots.get_facecolors()))
    assert sorted(at[:,1].tolist())==sorted(s.dice.dropna().tolist())
    face = face if len(face)==len(at) else np.repeat(face, len(at))
    seen = set()
    for i,c in enumerate(CLASSES):
        mine = at[:,0].round()==i
        assert set(face[mine])=={COLOURS[c]}
        for j,k in enumerate(kinds):
            wide = .7/len(kinds)
            box = (at[:,0]>=i-.35+j*wide)&(at[:,0]<=i-.35+(j+1)*wide)
            d = s[(s['class']==c)&(s.network==k)].dice.dropna()
            assert sorted(at[box,1].tolist())==sorted(d.tolist())
            seen |= set(np.flatnonzero(box))
    assert len(seen)==len(at)
    want = [m for c in CLASSES for k in kinds if not np.isnan(m := s[(s['class']==c)&(s.network==k)].dice.mean())]
    np.testing.assert_allclose([g[0,1] for g in means.get_segments()], want)
    if len(kinds)>1: assert [t.get_text() for t in ax.get_legend().get_texts()]==kinds
    assert ax.get_ylim()[0]<s.dice.min()

def test_markers_tell_networks_apart(rng):
    s = some_scores(rng, 4, ['x','y','z'])
    ax = plot_scores({k:g.drop(columns='network') for k,g in s.groupby('network')})
    shapes = {p.vertices.tobytes() for p in ax.collections[0].get_paths()}
    assert len(shapes)==3 and [t.get_text() for t in ax.get_legend().get_texts()]==['x','y','z']

def test_scores_of_a_class_that_is_nowhere(rng):
    s = some_scores(rng, 3, ['u']); s.loc[s['class']=='nucleus','dice'] = np.nan
    ax = plot_scores(s)
    assert [t.get_text() for t in ax.get_xticklabels()]==list(CLASSES) and len(ax.collections[1].get_segments())==2
    plot_scores(s.assign(dice=np.nan))

def test_history_with_one_epoch_and_without_validation():
    axs = plot_history(pd.DataFrame(dict(epoch=[0], train_loss=[.7], valid_loss=[np.nan])))
    assert axs[0].lines[0].get_marker()=='o' and axs[0].lines[0].get_ydata().tolist()==[.7]
    plot_history(pd.DataFrame(dict(epoch=[], train_loss=[], valid_loss=[])))

def test_calibration_bins_are_sklearns(rng):
    p = rng.dirichlet((1,1,1), (60,70)).transpose(2,0,1)
    y = rng.integers(0, 3, (60,70)).astype(np.uint8); y[rng.random(y.shape)<.1] = IGNORE
    n,keep = int(rng.integers(2, 20)),y!=IGNORE
    b = calibration_bins(p, y, n=n)
    for k,c in enumerate(CLASSES):
        right,given = calibration_curve(y[keep]==k, p[k][keep], n_bins=n)
        mine = b[(b['class']==c)&(b.n>0)]
        np.testing.assert_allclose(mine.given, given, atol=1e-5); np.testing.assert_allclose(mine.right, right, atol=1e-5)
        assert b[b['class']==c].n.sum()==keep.sum()
    top,hit = p.max(0)[keep],(p.argmax(0)==y)[keep]
    at = np.minimum((top*n).astype(int), n-1)
    ece = sum((at==i).mean()*abs(top[at==i].mean()-hit[at==i].mean()) for i in set(at))
    assert calibration_error(b)==pytest.approx(ece, abs=1e-5)
    ax = plot_calibration(b)
    assert ax.get_title().endswith(f'{calibration_error(b):.3f}')
    lines = {l.get_label():l for l in ax.lines}
    assert [to_hex(lines[c].get_color()).upper() for c in CLASSES]==[COLOURS[c] for c in CLASSES]
    for c in (*CLASSES,'predicted'):
        mine = b[(b['class']==c)&(b.n>0)]
        np.testing.assert_allclose(lines[c].get_xydata(), mine[['given','right']], atol=1e-9)

def test_calibration_of_several_fields_is_that_of_all_pixels(rng):
    ps,ys = zip(*[(rng.dirichlet((.5,1,2), (30,n)).transpose(2,0,1),rng.integers(0, 3, (30,n))) for n in rng.integers(5, 60, 3)])
    apart,whole = pd.concat([calibration_bins(p, y) for p,y in zip(ps,ys)]),calibration_bins(np.concatenate(ps, 2), np.concatenate(ys, 1))
    assert calibration_error(apart)==pytest.approx(calibration_error(whole), abs=1e-6)
    a,b = (plot_calibration(t) for t in (apart,whole))
    for x,y in zip(a.lines, b.lines): np.testing.assert_allclose(x.get_xydata(), y.get_xydata(), atol=1e-5)
    as_written = pd.concat([calibration_bins((p*255).round().astype(np.uint8), y) for p,y in zip(ps,ys)])
    assert calibration_error(as_written)==pytest.approx(calibration_error(whole), abs=.02)

def test_confusion_draws_shares_of_rows(rng):
    t,p = blobs(rng, (50,60)),blobs(rng, (50,60))
    t[t==1] = 0 # no cytoplasm in the truth
    counts = confusion(p, t)
    ax = plot_confusion(counts)
    share = ax.images[0].get_array()
    for i,j in np.ndindex(3, 3): assert share[i,j]==pytest.approx(((t==i)&(p==j)).sum()/max((t==i).sum(), 1))
    said = [x.get_text().split('\n') for x in ax.texts]
    assert [int(n.replace(',', '')) for _,n in said]==counts.flatten().tolist() and [s for s,_ in said[3:6]]==['–']*3
    assert hexes([x.get_bbox_patch().get_facecolor() for x in ax.get_xticklabels()])==[COLOURS[c] for c in CLASSES]

# ---- real images

def test_real_field(data):
    folder = data/'cellpainting_bf'
    f = {c:folder/f'r03c03f03p01-ch{k}sk1fk1fl1.tiff' for c,k in dict(brightfield=1, cytoplasm=3, nuclei=5).items()}
    axs = show_field(pd.Series(f))
    assert [ax.get_title() for ax in axs]==['bright-field','nuclei','cytoplasm'] and all('clipped' in notes(ax)[0] for ax in axs)
    np.testing.assert_array_equal(axs[1].images[0].get_array(), read_grey(f['nuclei']))

def test_real_two_classes(data):
    "Nuclei alone, 32-bit grey values: two classes in the colours they have elsewhere"
    f,classes = data/'brifiseg',('background','nucleus')
    row = dict(brightfield=f/'A549_001_BF.tif', label=f/'A549_001_nuclei.tif')
    axs = show_field(row, classes=classes)
    lbl = read_grey(row['label'])
    assert hexes(np.unique(axs[1].images[0].get_array()[lbl==1], axis=0)/255)==[COLOURS['nucleus']]
    axs = plot_sampling(PatchSampler([lbl.astype(np.uint8)], 128), 500, classes=classes)
    assert len(axs[1].containers)==2
