"Artefacts of bright-field images: against the exact masks of simulated fields, on drawn bubbles and debris, and on real images"
import os, re, warnings
from pathlib import Path
import numpy as np, pytest
from scipy import ndimage as ndi
from cellseg import artefacts
from cellseg.artefacts import artefact_mask,illumination,mark_artefacts
from cellseg.core import IGNORE,FieldsError,ImageError
from cellseg.io import image_info,read_grey,read_image,write_image
from cellseg.simulate import simulate_field,simulate_fields

def fresh(rng): return int(rng.integers(2**31))

# Simulated fields

@pytest.mark.parametrize('kwargs', [{}, dict(confluence=.3), dict(confluence=.05), dict(confluence=.7, z=3), dict(pixel_size=.65), dict(pixel_size=.5, confluence=.3),
    dict(noise=3), dict(noise=.5, confluence=.3, illumination=.8), dict(z=-6), dict(z=0)], ids=str)
def test_bubbles_are_found_and_clean_places_are_not(rng, kwargs):
    sim = simulate_field(seed=fresh(rng), bubbles=int(rng.integers(1,6)), **kwargs) # another field each time
    mask = artefact_mask(sim.brightfield, kwargs.get('pixel_size'))
    assert mask[sim.artefact==2].mean()>=.95
    assert mask[sim.artefact==0].mean()<=.01

@pytest.mark.parametrize('kwargs,least', [({}, .65), (dict(confluence=.3), .5), (dict(confluence=.7, z=3), .6), (dict(pixel_size=.65), .7), (dict(z=0), .65)], ids=str)
def test_cells_out_of_focus_are_found(rng, kwargs, least):
    sim = simulate_field((1200,1500), seed=fresh(rng), defocus=.25, **kwargs)
    mask = artefact_mask(sim.brightfield, kwargs.get('pixel_size'))
    assert mask[(sim.artefact==3)&(sim.label>0)].mean()>=least
    assert mask[sim.artefact==0].mean()<=.02

@pytest.mark.parametrize('kwargs', [{}, dict(confluence=.3), dict(confluence=.97, z=6), dict(z=-8), dict(pixel_size=1.)], ids=str)
def test_a_good_field_is_left_alone(rng, kwargs):
    sim = simulate_field((800,1000), seed=fresh(rng), dust=0, **kwargs)
    assert artefact_mask(sim.brightfield, kwargs.get('pixel_size')).mean()<=(.01 if kwargs.get('z')==-8 else .001) # so far from focus .6 % was seen in other fields, too

def test_a_field_wholly_out_of_focus_is_marked(rng):
    assert artefact_mask(simulate_field((700,900), seed=fresh(rng), z=-25).brightfield).mean()>.5

def test_nothing_in_an_empty_field(rng):
    light = 1 - .4*(np.linspace(-.7, 1.2, 640)[:,None]**2 + np.linspace(-1, 1, 800)**2)/2
    for counts in (30,1000,50000): assert not artefact_mask(rng.poisson(counts*light)).any()

# Drawn bubbles and debris: they look otherwise than those of the simulation

def bubble(img, row, col, radius, rim, black, middle):
    "A black ring of width `rim` (share of the radius) on the image; through the middle the cells are seen `middle` times as bright. Changes `img`; the disc"
    d = np.hypot(*[a-o for a,o in zip(np.ogrid[tuple(slice(s) for s in img.shape)], (row,col))])/radius
    img *= np.where(d>1, 1, np.where(d>1-rim, black, middle))
    return d<=1

@pytest.mark.parametrize('kwargs', [{}, dict(confluence=.3)], ids=str)
def test_bubbles_cut_by_borders_and_corners(rng, kwargs):
    sim = simulate_field((900,1200), seed=fresh(rng), dust=0, **kwargs)
    h,w = sim.label.shape
    for row,col in [(0,0), (h-20,w+15), (10,w-30), (-40,500), (h+50,300), (450,-45), (300,w-10), (450,600)]: # some centres lie outside
        img = sim.brightfield.astype(np.float32)
        disc = bubble(img, row, col, radius=float(rng.uniform(80,190)), rim=.2, black=.3, middle=1.1)
        mask = artefact_mask(img)
        assert mask[disc].mean()>=.95, (row,col)
        assert mask[~disc].mean()<=.01, (row,col)

def test_background_shut_in_by_bubbles_stays(rng):
    sim = simulate_field((900,1200), seed=fresh(rng), dust=0, confluence=.5)
    img,discs = sim.brightfield.astype(np.float32),np.zeros(sim.label.shape, bool)
    for row,col in ((150,30),(330,260),(560,250),(740,40)): # a wall around a place at the left border; each lies over a part of the one before
        one = sim.brightfield.astype(np.float32)
        disc = bubble(one, row, col, radius=175, rim=.2, black=.2, middle=1.3)
        img[disc] = one[disc]; discs |= disc
    mask = artefact_mask(img)
    assert not mask[420:480,:40].any()
    assert mask[discs].mean()>=.95 and mask[~discs].mean()<=.015

def test_debris_is_found(rng):
    sim = simulate_field((900,1200), seed=fresh(rng), dust=0, confluence=float(rng.choice([.3,.7,.9])))
    d = np.hypot(*np.ogrid[-300:600,-500:700])
    glare = ndi.gaussian_filter(rng.standard_normal(d.shape), 3)
    img = sim.brightfield*np.where(d<75, (1+.6*glare/glare.std()).clip(.2,3), 1)
    mask = artefact_mask(img)
    assert mask[d<75].mean()>.85 and mask[d>90].mean()<.005
    assert not artefact_mask(img, rough=np.inf)[d<40].all() # what `rough` is for

def test_background_is_not_bent_by_bubbles(rng):
    shape = 600,800
    light = 3000*(1 - .3*(np.linspace(-1, .8, shape[0])[:,None]**2 + np.linspace(-.9, 1, shape[1])**2)/2)
    img = rng.poisson(light).astype(np.float32)
    for _ in range(4): bubble(img, *rng.uniform(0, shape), radius=110, rim=.25, black=.15, middle=1.2)
    assert np.abs(illumination(img)/light-1).max()<.02

def test_each_part_can_be_turned_off(rng):
    sim = simulate_field((1000,1200), seed=fresh(rng), bubbles=1, defocus=.25, dust=0)
    focus,opaque = sim.artefact==3,sim.artefact==2
    only_bubbles = artefact_mask(sim.brightfield, sharp=0)
    assert only_bubbles[opaque].mean()>.95 and only_bubbles[focus].mean()<.05
    assert artefact_mask(sim.brightfield, dark=1, rough=np.inf, sharp=0).sum()==0

# What must not matter

def test_units_type_and_orientation_do_not_matter(rng):
    sim = simulate_field((798,999), seed=fresh(rng), bubbles=2, defocus=.2) # whole blocks of 3: a mirrored image has the same blocks
    img = sim.brightfield
    mask = artefact_mask(img)
    assert mask.shape==img.shape and mask.dtype==bool and .02<mask.mean()<.9
    def same(other): return (other==mask).mean()>.995
    assert same(artefact_mask(img.astype(np.float64)*7e-5))
    assert same(artefact_mask((img/256).round().astype(np.uint8)))
    assert same(artefact_mask(img[::-1])[::-1]) and same(artefact_mask(img.T).T)
    assert artefact_mask(img[:-1,:-2]).shape==(797,997)

def test_pixel_size_matters(rng):
    img = simulate_field((800,1000), seed=fresh(rng), dust=0).brightfield.astype(np.float32)
    disc = bubble(img, 400, 500, radius=30, rim=.25, black=.15, middle=1) # at .345 µm a rim of 2.6 µm; at 2 µm of 15
    assert artefact_mask(img, 2)[disc].mean()>.95 and not artefact_mask(img, .1, sharp=0)[~disc].any()

def test_it_is_quick_enough_for_plates(rng):
    from time import process_time
    img = simulate_field(seed=fresh(rng), bubbles=3).brightfield
    times = []
    for _ in range(3): t = process_time(); artefact_mask(img); times.append(process_time()-t)
    assert min(times)<1 # 0.14 s where this was written

# Real images; places (row, column) read by eye

def test_real_debris_is_found_and_cells_are_not(data):
    img = read_grey(data/'cellpainting_bf'/'r03c03f03p01-ch1sk1fk1fl1.tiff')
    mask = artefact_mask(img, .6)
    debris = [(265,500),(290,485),(300,530),(320,560),(340,535),(350,545),(370,550)]
    worm = [(105,42)]
    cells = [(80,225),(120,410),(60,480),(120,550),(200,600),(75,760),(60,690),(95,910),(200,185),(210,320),(285,30),(290,420),(300,870),(390,990),(430,180),(420,360),(510,650),
        (540,560),(530,100),(530,205),(595,255),(660,130),(740,80),(830,490),(570,930),(690,810),(710,890),(940,590),(970,715),(800,1050),(970,1020),(35,20)]
    assert all(mask[p] for p in debris+worm)
    assert not any(mask[p] for p in cells)
    clump = np.zeros(img.shape, bool); clump[245:420,465:620] = True
    assert .05<mask[clump].mean()<.6 and mask[~clump].mean()<.01

def test_real_cells_on_glass_are_left_alone(data):
    shares = {p.name:artefact_mask(read_grey(p)).mean() for p in sorted((data/'brifiseg').glob('*_BF.tif'))}
    assert len(shares)==5 and max(shares.values())<.005, shares

def test_real_phase_contrast_is_left_alone(data):
    "A stretched contrast: limits of the field itself. One smear is softer than the rest, which grows out of focus (planes 2 and 10 of 13)"
    masks = {int(re.search(r'z_depth-(\d+)', p.name)[1]):artefact_mask(read_grey(p)) for p in (data/'isl_neuron').glob('*z_depth-*')}
    assert sorted(masks)==[2,4,6,8,10]
    assert all(m.mean()<.04 for m in masks.values()), {z:m.mean() for z,m in masks.items()}
    neurons = [(640,85),(720,90),(100,665),(150,690),(190,770),(270,640),(200,600),(640,770),(700,730),(980,640),(605,855),(340,495)]
    assert not any(m[p] for m in masks.values() for p in neurons)

def test_a_bubble_on_a_real_image_is_found(data, rng):
    for p in sorted((data/'brifiseg').glob('*_BF.tif'))+[data/'cellpainting_bf'/'r03c03f03p01-ch1sk1fk1fl1.tiff']:
        img = read_grey(p).astype(np.float32)
        disc = bubble(img, *rng.uniform(0, img.shape), radius=float(rng.uniform(70,130)), rim=.22, black=.2, middle=1.1)
        assert artefact_mask(img, .6 if 'ch1' in p.name else None)[disc].mean()>.95, p.name

@pytest.mark.parametrize('field,settings', [(4,{}), (2,dict(contrast=.008))], ids=str) # the cells of field 2 are paler
def test_a_blur_of_a_real_image_is_found(data, field, settings):
    img = read_grey(data/'brifiseg'/f'A549_00{field}_BF.tif').astype(np.float32)
    assert artefact_mask(img, **settings).mean()<.01
    half = img.copy(); half[:,256:] = ndi.gaussian_filter(img, 3)[:,256:]
    mask = artefact_mask(half, **settings)
    assert mask[:,256:].mean()>.1 and mask[:,:236].mean()<.01

# Bad input

@pytest.mark.parametrize('bad,says', [
    (np.full((300,300),np.nan), 'NaN'), (np.where(np.eye(300), np.inf, 1), 'NaN or infinity'), (np.full((300,300),9), r'everywhere \(9\)'), (np.ones((300,300,3)), r'\(300, 300, 3\)'),
    (np.ones(300), r'\(300,\)'), (np.eye(300)>0, 'not bool'), (np.array([['a','b']]), 'not <U1'), (np.eye(10), 'too small'), (np.zeros((0,5)), 'too small'), (np.eye(300)-.5, 'bright background')])
def test_bad_images_are_refused(bad, says):
    with pytest.raises(ImageError, match=says): artefact_mask(bad)

@pytest.mark.parametrize('px', [0,-1,np.nan,np.inf])
def test_bad_pixel_size_is_refused(px):
    with pytest.raises(ImageError, match='pixel_size'): artefact_mask(np.eye(300), px)

# Many fields

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    return simulate_fields(tmp_path_factory.mktemp('fields'), 5, (300,400), seed=8, bubbles=1, pixel_size=.65)

def content(fields): return [Path(p).read_bytes() for p in fields.label]

def test_fields_are_marked_and_originals_stay(made, tmp_path):
    before = content(made)
    done = mark_artefacts(made, tmp_path/'new')
    assert content(made)==before
    assert done.drop(columns=['label','artefact_share','problem','note']).equals(made.drop(columns='label'))
    assert done.problem.isna().all()
    for old,new,truth,share in zip(made.label, done.label, made.artefact, done.artefact_share):
        a,b,t = read_image(old),read_image(new),read_image(truth)
        assert b.dtype==np.uint8 and image_info(new).pixel_size==pytest.approx(.65)
        assert (b[t==2]==IGNORE).mean()>=.95 and (b[t==0]==IGNORE).mean()<=.05 # a small field with a large bubble
        assert (b[b!=IGNORE]==a[b!=IGNORE]).all() and share==pytest.approx((b==IGNORE).mean())

def test_several_processes_do_the_same(made, tmp_path):
    one,two = [mark_artefacts(made, tmp_path/str(n), n_jobs=n) for n in (1,2)]
    assert content(one)==content(two) and one.artefact_share.equals(two.artefact_share)

def test_bad_fields_are_listed_and_the_rest_done(made, tmp_path):
    fields = made.copy().set_index(np.array([7,7,1,0,3])) # an index as joined tables have it
    fields['problem'],fields['note'] = [[None]*4+['stain missing'], ['dim']+[None]*4]
    col = {c:fields.columns.get_loc(c) for c in fields}
    write_image(tmp_path/'small.tif', np.zeros((300,399), np.uint8)); write_image(tmp_path/'flat.tif', np.full((300,400), 7, np.uint16))
    fields.iloc[1,col['label']] = str(tmp_path/'small.tif')
    fields.iloc[2,col['brightfield']] = str(tmp_path/'flat.tif')
    fields.iloc[3,col['brightfield']] = str(tmp_path/'none.tif')
    fields.iloc[4,col['label']] = None
    with pytest.warns(UserWarning, match='4 of 5'): done = mark_artefacts(fields, tmp_path/'new')
    assert done.index.tolist()==[7,7,1,0,3] and done.label.notna().tolist()==[True]+[False]*4
    assert done.problem.iloc[0] is None and done.artefact_share.notna().tolist()==[True]+[False]*4
    for got,want in zip(done.problem.iloc[1:], [r'\(300, 399\)','everywhere','no such file','stain missing']): assert re.search(want, got)
    assert 'dim' in done.note.iloc[0]
    assert sorted(p.name for p in (tmp_path/'new').glob('*.tif'))==['sim0000_label.tif']
    with pytest.raises(FieldsError, match='no field could be searched for artefacts'): mark_artefacts(fields[1:], tmp_path/'new')

def test_it_goes_on_where_it_was_stopped(made, tmp_path, monkeypatch):
    calls,real = [],artefact_mask
    def counted(*args, **kwargs):
        if len(calls)==2: raise KeyboardInterrupt
        calls.append(1); return real(*args, **kwargs)
    monkeypatch.setattr(artefacts, 'artefact_mask', counted)
    with pytest.raises(KeyboardInterrupt): mark_artefacts(made, tmp_path/'new', n_jobs=1)
    calls[:] = [1]*10
    done = mark_artefacts(made, tmp_path/'new', n_jobs=1)
    assert len(calls)==13 and done.label.notna().all() # three were left
    mark_artefacts(made, tmp_path/'new', n_jobs=1)
    assert len(calls)==13

def test_kept_results_are_believed_only_if_the_file_is_theirs(made, tmp_path):
    first = content(mark_artefacts(made, tmp_path/'new'))
    other = content(mark_artefacts(made, tmp_path/'new', dark=1, rough=np.inf, sharp=0)) # other settings write over them
    assert first!=other and all((read_image(a)!=IGNORE).all() for a in (tmp_path/'new').glob('*.tif'))
    (tmp_path/'new'/'sim0002_label.tif').unlink()
    again = mark_artefacts(made, tmp_path/'new')
    assert content(again)==first and again.problem.isna().all()

def test_originals_are_never_written_over(made, tmp_path, monkeypatch):
    home = Path(made.label[0]).parent
    (tmp_path/'link').symlink_to(home)
    monkeypatch.chdir(home)
    before = content(made)
    for out in (home, tmp_path/'link', '.'):
        with pytest.raises(FieldsError, match='would be written over'): mark_artefacts(made, out)
    done = mark_artefacts(made, tmp_path/'new')
    with pytest.raises(FieldsError, match='would be written over'): mark_artefacts(done, tmp_path/'new')
    assert content(made)==before

def test_bad_tables_are_refused(made, tmp_path):
    with pytest.raises(FieldsError, match='found 5 fields with columns field, brightfield'): mark_artefacts(made[['field','brightfield']], tmp_path)
    with pytest.raises(FieldsError, match='found 0 fields'): mark_artefacts(made[:0], tmp_path)
    with pytest.raises(FieldsError, match='there twice'): mark_artefacts(made.assign(field='a'), tmp_path/'new')
