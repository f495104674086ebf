"Simulated fields: same bytes for same seed, exact shares, exact masks, optics as the theory says"
import hashlib,subprocess,sys
from pathlib import Path
import numpy as np, pytest
from scipy import ndimage as ndi
from scipy.special import j1
from cellseg.io import read_image,image_info
from cellseg.simulate import propagate,bright_field,fluorescence,camera,simulate_field,simulate_fields

def _hashes(folder): return {p.name:hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}

def test_same_seed_same_bytes_in_another_process(tmp_path):
    simulate_fields(tmp_path/'a', 3, (160,200), seed=5, bubbles=1)
    code = 'import sys; from cellseg.simulate import simulate_fields; simulate_fields(sys.argv[1], 2, (160,200), seed=5, bubbles=1)'
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'b')], check=True)
    a,b = _hashes(tmp_path/'a'),_hashes(tmp_path/'b')
    assert len(b)==12 and len(set(b.values()))==12
    assert all(a[k]==v for k,v in b.items()) # fewer fields, same files
    simulate_fields(tmp_path/'c', 1, (160,200), seed=6, bubbles=1)
    assert not set(_hashes(tmp_path/'c').values()) & set(a.values())

def test_global_generator_is_not_touched():
    np.random.seed(3); want = np.random.rand(4)
    np.random.seed(3); simulate_field((100,100))
    assert (np.random.rand(4)==want).all()

@pytest.mark.parametrize('confluence,nuclear_share', [(15/16,1/3), (.3,1/3), (.6,.15), (.98,.2), (.02,.1)])
def test_shares(confluence, nuclear_share):
    f = simulate_field((720,960), seed=9, confluence=confluence, nuclear_share=nuclear_share)
    share = np.bincount(f.label.ravel(), minlength=3)/f.label.size
    want = np.array([1-confluence, confluence*(1-nuclear_share), confluence*nuclear_share])
    np.testing.assert_allclose(share, want, rtol=.002)
    assert ((f.cells>0)==(f.label>0)).all()

def test_paper_shares_at_default_size():
    n = np.bincount(simulate_field(seed=3).label.ravel(), minlength=3)
    np.testing.assert_allclose(n/n[0], [1,10,5], rtol=.02)

@pytest.mark.parametrize('shape', [(64,64), (65,333), (1000,64)])
@pytest.mark.parametrize('seed', range(4))
def test_odd_and_small_fields(shape, seed):
    f = simulate_field(shape, seed=seed, confluence=.9, diameter=15, bubbles=1, defocus=.1)
    assert all(img.shape==shape for img in f)
    assert abs((f.label>0).mean()-.9) < .01

def test_nuclei_lie_inside_cells_and_cells_are_whole():
    f = simulate_field((900,900), seed=1)
    ring = ndi.binary_dilation(f.label==2) & (f.label!=2)
    assert (f.label[ring]==1).all() # no nucleus touches the background
    ids = [i for i in np.unique(f.cells) if i]
    whole = sum(ndi.label(f.cells==i)[1]==1 for i in ids)
    one = sum(ndi.label((f.cells==i)&(f.label==2), np.ones((3,3)))[1]<=1 for i in ids)
    assert whole > .97*len(ids) and one > .97*len(ids)

def test_mask_is_where_the_image_differs():
    kw = dict(shape=(500,600), seed=4)
    clean,spoilt = simulate_field(dust=0, **kw),simulate_field(dust=15, bubbles=2, defocus=.2, **kw)
    differ = clean.brightfield!=spoilt.brightfield
    assert not differ[spoilt.artefact==0].any() and (clean.artefact==0).all()
    for code in (1,2,3): assert differ[spoilt.artefact==code].mean() > (.8,.97,.9)[code-1]
    for a,b in zip(clean[1:5], spoilt[1:5]): assert (a==b).all() # stains and truth untouched

def test_bubble_mask_is_discs():
    f = simulate_field((600,600), seed=12, bubbles=1, dust=0)
    y,x = np.nonzero(f.artefact==2)
    h,w = np.ptp(y)+1,np.ptp(x)+1
    if min(y.min(),x.min())>0 and max(y.max(),x.max())<599: assert abs(h-w)<=2 and abs(len(y)/(np.pi*h*w/4)-1)<.03
    else: assert len(y)>100

@pytest.mark.parametrize('z', [-30,-5,2.5,12])
@pytest.mark.parametrize('waves', [6,15,40])
def test_weak_phase_contrast_follows_theory(z, waves):
    eps,px,n = .02,.3,360
    k = waves/(n*px)
    line = np.cos(2*np.pi*k*np.arange(n)*px)
    light = np.exp(1j*eps*line)[:,None]*np.ones((1,50))
    got = propagate(light.astype(np.complex64), z, pixel_size=px, na=.6, wavelength=.5, index=1.4, directions=1)
    contrast = 2*(got[:,7]*line).mean()
    assert contrast == pytest.approx(2*eps*np.sin(np.pi*.5/1.4*z*k**2), abs=4e-4)

def test_waves_finer_than_the_aperture_vanish():
    px,n = .25,400
    for waves,seen in ((60,True),(140,False)): # .6 and 1.4 per µm; the aperture ends at 1
        line = np.exp(.1*np.cos(2*np.pi*waves*np.arange(n)/n))[:,None]*np.ones((1,40))
        img = propagate(line.astype(np.complex64), 0, pixel_size=px, na=.5, wavelength=.5, directions=1)
        assert (np.ptp(img)>.1)==seen

def test_point_of_light_becomes_an_airy_disc():
    px,n,na,lam = .1,301,.5,.55
    light = np.zeros((n,n), np.complex64); light[150,150] = 1
    img = propagate(light, 0, pixel_size=px, na=na, wavelength=lam, directions=1)[150]
    v = 2*np.pi*na/lam*np.abs(np.arange(n)-150)*px
    airy = (2*j1(v[151:175])/v[151:175])**2
    np.testing.assert_allclose(img[151:175]/img[150], airy, atol=.012)

def test_light_is_kept():
    rng = np.random.default_rng(0)
    path = ndi.gaussian_filter(rng.standard_normal((300,300)), 6).astype(np.float32)*.5
    for z in (-9,0,4): assert bright_field(path, z, absorption=0).mean() == pytest.approx(1, abs=.01)
    a,b = rng.random((2,256,256)).astype(np.float32)
    n,c = fluorescence(a, b, bleed_through=.1)
    assert n.mean() == pytest.approx(a.mean()+.1*b.mean(), rel=.01) and c.mean() == pytest.approx(b.mean()+.1*a.mean(), rel=.01)

def test_camera_noise_is_shot_plus_read():
    rng,levels = np.random.default_rng(1),np.array([0,100,2000,30000])
    light = np.repeat(levels, 40000).reshape(4,40000).astype(np.float32)
    img = camera(rng, light, offset=500, gain=3, read=8).astype(float)
    np.testing.assert_allclose(img.mean(1)-500, levels, atol=2.5)
    np.testing.assert_allclose(img.var(1), 3*levels+64, rtol=.04)
    assert (camera(rng, light, noise=0)[2]==2000).all()

def test_bleed_through_and_illumination_do_what_they_say():
    kw = dict(shape=(400,400), seed=8, noise=0, dust=0)
    def halo(f): return f.nuclei[f.label==1].mean()-f.nuclei[f.label==0].mean()
    assert halo(simulate_field(bleed_through=.3, **kw)) > 3*halo(simulate_field(bleed_through=.05, **kw)) - 1
    even,dark = simulate_field(illumination=0, **kw),simulate_field(illumination=.6, **kw)
    ratio = (dark.cytoplasm-300.)/(even.cytoplasm-300.)
    assert ratio.max()<=1.01 and .38<ratio[even.cytoplasm>800].min()<.6

def test_written_files_keep_type_and_pixel_size(tmp_path):
    fields = simulate_fields(tmp_path, 1, (100,140), pixel_size=.5, defocus=.3)
    for c,t in dict(brightfield='uint16', nuclei='uint16', cytoplasm='uint16', label='uint8', cells='uint16', artefact='uint8').items():
        img,info = read_image(fields[c][0]),image_info(fields[c][0])
        assert img.dtype==t and img.shape==(100,140) and info.pixel_size==pytest.approx(.5)
    assert set(np.unique(read_image(fields.label[0]))) <= {0,1,2}
