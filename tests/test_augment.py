"Augmentation against SimpleITK and scipy, with fresh random inputs each time"
import numpy as np, pandas as pd
import pytest, torch
from scipy.ndimage import binary_dilation,gaussian_filter
from fastai.torch_core import TensorImage,TensorMask
from cellseg.augment import RandomDihedral,RandomWarp,RandomOptics,bspline_displacement,gaussian_blur,paper_augment,sample_at
from cellseg.core import CellsegError,IGNORE
from cellseg.data import patch_dls
from cellseg.io import write_image
sitk = pytest.importorskip('SimpleITK')

def itk_spline(coef, size, start=(0,0)):
    "SimpleITK's transform with these coefficients (2,m+3,n+3), its domain the outer edges of `size` pixels from pixel `start`"
    t = sitk.BSplineTransform(2, 3)
    t.SetTransformDomainOrigin([float(s)-.5 for s in start[::-1]])
    t.SetTransformDomainPhysicalDimensions([float(s) for s in size[::-1]])
    t.SetTransformDomainMeshSize([n-3 for n in coef.shape[:0:-1]])
    t.SetParameters(np.concatenate([coef[1].ravel(),coef[0].ravel()]).astype(float).tolist())
    return t

def itk_field(t, size, start=(0,0)):
    "Displacement (2,H,W) as `(dy,dx)` of each pixel"
    d = sitk.TransformToDisplacementField(t, sitk.sitkVectorFloat64, [int(s) for s in size[::-1]], [float(s) for s in start[::-1]])
    return sitk.GetArrayFromImage(d).transpose(2,0,1)[::-1]

def itk_read(img, t, size, start=(0,0), nearest=False):
    "Image (H,W) resampled by SimpleITK"
    how = sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear
    return sitk.GetArrayFromImage(sitk.Resample(sitk.GetImageFromArray(img), [int(s) for s in size[::-1]], t, how,
        [float(s) for s in start[::-1]], [1.,1.], [1.,0.,0.,1.], 0.))

def blobs(rng, shape, n=3, sigma=6): return np.stack([gaussian_filter(rng.normal(size=shape), sigma) for _ in range(n)]).argmax(0).astype(np.uint8)
def tensors(*arrays): return tuple(t(torch.from_numpy(np.ascontiguousarray(a))) for t,a in zip((TensorImage,TensorMask), arrays))

@pytest.mark.parametrize('i', range(12))
def test_displacement_is_simpleitks(rng, i):
    size,mesh = rng.integers(8, 400, 2),rng.integers(1, 7, 2)
    if i<4: mesh = (2,2)
    if i<2: size = (224,224)
    coef = rng.normal(0, 15, (3,2,mesh[0]+3,mesh[1]+3))
    got = bspline_displacement(torch.from_numpy(coef).float(), tuple(int(s) for s in size))
    assert got.shape==(3,2,*size) and got.dtype==torch.float32
    for c,g in zip(coef, got): np.testing.assert_allclose(g, itk_field(itk_spline(c, size), size), atol=1e-3, rtol=0)

@pytest.mark.parametrize('size', [(224,224),(97,180),(301,64)])
def test_resampling_is_simpleitks(rng, size):
    "Whole path through `sample_at`, on noise, which forgives nothing"
    img,lbl = rng.uniform(0, 255, size).astype(np.float32),blobs(rng, size)
    coef = rng.normal(0, 15, (1,2,5,5))
    d = bspline_displacement(torch.from_numpy(coef), size)
    pos = (d+torch.from_numpy(np.indices(size))).float()
    inside = ((pos>1)&(pos<torch.tensor(size)[:,None,None]-2)).all(1)[0].numpy()
    assert inside.mean()>.5
    t = itk_spline(coef[0], size)
    got = sample_at(torch.from_numpy(img)[None,None], pos)[0,0].numpy()
    assert np.abs(got-itk_read(img, t, size))[inside].max()<1
    got = sample_at(torch.from_numpy(lbl)[None], pos)[0].numpy()
    assert (got==itk_read(lbl, t, size, nearest=True))[inside].mean()>=.999

def itk_warp(aug, i, n):
    "What `aug` did to its `i`-th patch as a SimpleITK transform on the batch of n x n pixels: turn indices with numpy, add SimpleITK's spline"
    m,s = aug.margin,aug.size
    k,start,here = int(aug.ks[i]),(m,m),np.indices((s,s))+m
    turned = np.rot90(here, k%4, (1,2))
    if k>3: turned = turned[:,:,::-1]
    d = itk_field(itk_spline(aug.coef[i], (s,s), start), (s,s), start) + turned-here
    f = sitk.GetImageFromArray(np.ascontiguousarray(d[::-1].transpose(1,2,0)), isVector=True)
    f.SetOrigin([float(m)]*2)
    return sitk.DisplacementFieldTransform(f),(s,s),start

@pytest.mark.parametrize('size,sigma,mesh', [(224,15,2),(96,7.3,4),(65,20,1)])
def test_whole_transform_is_simpleitks(rng, size, sigma, mesh):
    "Turn, flip and bend at once; with the margin no pixel of the patch is read beyond the batch"
    aug = RandomWarp(size, sigma, mesh, seed=int(rng.integers(1e9)))
    n = size+2*aug.margin
    img,lbl = rng.uniform(0, 255, (8,2,n,n)).astype(np.float32),np.stack([blobs(rng, (n,n)) for _ in range(8)])
    x,y = aug(tensors(img,lbl), split_idx=0)
    assert x.shape==(8,2,size,size) and y.shape==(8,size,size) and y.dtype==torch.uint8
    assert len(set(aug.ks))>2
    for i in range(8):
        t = itk_warp(aug, i, n)
        for c in range(2): assert np.abs(x[i,c].numpy()-itk_read(img[i,c], *t)).max()<1
        assert (y[i].numpy()==itk_read(lbl[i], *t, nearest=True)).mean()>=.999

def test_image_and_label_never_part(rng):
    aug = RandomWarp(128, 15, seed=int(rng.integers(1e9))); n = 128+2*aug.margin
    lbl = np.stack([blobs(rng, (n,n), 2) for _ in range(6)])
    x,y = aug(tensors(lbl[:,None].astype(np.float32),lbl), split_idx=0)
    for img,l in zip(x[:,0].numpy(), y.numpy()):
        rim = binary_dilation(np.pad(l,1,mode='edge')[2:,1:-1]!=l)|binary_dilation(np.pad(l,1,mode='edge')[1:-1,2:]!=l) # within a pixel of the border of classes
        assert ((img>.5)==(l>0))[~rim].all()
        assert ((img>.5)==(l>0)).mean()>.98
    exact = RandomDihedral(seed=int(rng.integers(1e9)))
    x,y = exact(tensors(lbl[:,None].astype(np.float32),lbl), split_idx=0)
    assert (x[:,0].numpy()==y.numpy()).all() and (y.numpy()!=lbl).any()

def test_chance_is_as_stated(rng):
    "All eight symmetries alike; pixels move by what the weights of 16 normal numbers predict, and never beyond the margin"
    aug = RandomWarp(40, 15, seed=int(rng.integers(1e9))); n = 40+2*aug.margin
    x = TensorImage(torch.from_numpy(np.indices((n,n))-aug.margin).float()).expand(4000,2,n,n) # an image of its own coordinates
    moved,ks = aug((x,), split_idx=0)[0].numpy(),aug.ks
    assert np.abs(np.bincount(ks, minlength=8)/4000-1/8).max()<.026 # five standard deviations
    d = moved[ks==0]-np.indices((40,40))
    assert np.abs(moved-19.5).max()<=19.5+aug.margin
    assert abs(d[:,:,0,0].std()/7.5-1)<.12 and abs(d.mean())<1 # sqrt((1+16+1)/36)**2 = 1/2 at a corner of the mesh

def test_the_worst_draw_stays_within_the_margin(rng):
    class Worst:
        def integers(self, n, size): return rng.integers(n, size=size)
        def normal(self, mean, sigma, shape): return np.broadcast_to(rng.choice([-1e3,1e3], (shape[0],2,1,1)), shape) # all pulled the same way
    aug = RandomWarp(50, 15); aug.rng,n = Worst(),140
    x = TensorImage(torch.from_numpy(np.indices((n,n))).float()).expand(40,2,n,n)
    moved = aug((x,), split_idx=0)[0]
    assert aug.unit.abs().max()<1 # within the outer edges of what was given
    assert abs(moved.min())<1e-3 and abs(moved.max()-(n-1))<1e-3 # and all of it is used

def test_reduced_precision_moves_no_pixel(rng):
    coef = torch.from_numpy(rng.normal(0, 15, (2,2,5,5))).float()
    want = bspline_displacement(coef, 224)
    old = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        with torch.autocast('cpu', torch.bfloat16): got = bspline_displacement(coef, 224)
    finally: torch.set_float32_matmul_precision(old)
    assert got.dtype==torch.float32 and (got-want).abs().max()<1e-5

@pytest.fixture
def coordinates(tmp_path, rng):
    "Two fields whose two channels hold the row and the column of each pixel, with random labels"
    rows = []
    for i,(h,w) in enumerate([(150,190),(131,128)]):
        r,c = np.indices((h,w))
        ims = dict(row=r*100, col=c*100, label=blobs(rng, (h,w)))
        for k,im in ims.items(): write_image(tmp_path/f'{i}_{k}.tif', im.astype(np.uint8 if k=='label' else np.uint16))
        rows.append(dict(field=f'f{i}', fold=i, **{k:str(tmp_path/f'{i}_{k}.tif') for k in ims}) | dict(lbl=ims['label']))
    return pd.DataFrame(rows)

def read_back(dls, x, field):
    "Row and column at which each pixel of a batch was read"
    rg = dls.store.ranges[field]
    return np.stack([((x[:,i].numpy()+1)*(rg[i,1]-rg[i,0])/2+rg[i,0])/100 for i in (0,1)], 1)

def test_loaded_patches_hold_real_pixels_wherever_the_field_has_them(coordinates, rng):
    lbl = coordinates.lbl[0]; h,w = lbl.shape
    aug = paper_augment(96, sigma=25, seed=int(rng.integers(1e9)))
    dls = patch_dls(coordinates, size=96, bs=8, inputs=('row','col'), valid_fold=1, n_train=64, batch_tfms=aug, device='cpu')
    seen = 0
    for x,y in dls.train:
        assert x.shape==(8,2,96,96) and y.shape==(8,96,96) and y.dtype==torch.int64
        (r,c),y = read_back(dls, x, 0).transpose(1,0,2,3),y.numpy()
        gone = y==IGNORE
        edge = np.minimum.reduce([r, h-1-r, c, w-1-c]) # how far from the outermost pixels' centres; beyond them the edge is repeated
        assert edge.min()>-.01
        assert (edge[gone]<.01).all()      # ignored only where the field has ended
        ok = ~gone & (np.abs(r%1-.5)>.01) & (np.abs(c%1-.5)>.01) # halfway between two pixels either may be the nearest
        assert (y==lbl[r.round().astype(int).clip(0,h-1),c.round().astype(int).clip(0,w-1)])[ok].all()
        seen += gone.sum()
    assert seen>0

def test_translation_is_even_and_stays_in_the_field(tmp_path, rng):
    lbl = np.zeros((700,800), np.uint8); lbl[350,400] = 1
    for k,im in dict(bf=rng.integers(0, 999, lbl.shape).astype(np.uint16), label=lbl).items(): write_image(tmp_path/f'{k}.tif', im)
    fields = pd.DataFrame([dict(field=str(i), fold=i, brightfield=str(tmp_path/'bf.tif'), label=str(tmp_path/'label.tif')) for i in (0,1)])
    make = lambda t: patch_dls(fields, classes=('a','b'), weights=(0,1), bs=4, batch_tfms=t, device='cpu', n_train=4, seed=int(rng.integers(1e9))).train.draw(4000)
    p = make(paper_augment())
    for k,at in (('row',350-112),('col',400-112)):
        d = p[k]-at
        assert -122<=d.min()<-115 and 115<d.max()<=122
        assert abs(d.mean())<6 and abs(d.std()/70.7-1)<.06 # of an even distribution over 245 pixels
    assert (p['margin']==45).all()
    still = make(())
    assert set(still['row'])=={350-112} and (still['margin']==0).all()
    far = make(paper_augment(shift=600)); assert far['row'].min()>=0 and far['row'].max()<=700-224 and far['col'].max()<=800-224

def test_turned_and_moved_patches_are_exact(coordinates, rng):
    "Without bending every grey value is one of the field, and belongs to its label"
    lbl = coordinates.lbl[0]
    dls = patch_dls(coordinates, size=96, bs=8, inputs=('row','col'), valid_fold=1, n_train=16, batch_tfms=paper_augment(96, sigma=0), device='cpu')
    for x,y in dls.train:
        rc = read_back(dls, x, 0); at = rc.round().astype(int)
        assert np.abs(rc-at).max()<1e-3
        assert (lbl[at[:,0],at[:,1]]==y.numpy()).all()

def test_seed_and_validation(coordinates):
    make = lambda t,w=0: patch_dls(coordinates, size=96, bs=4, inputs=('row','col'), n_train=8, batch_tfms=t, num_workers=w, device='cpu')
    def epochs(dls): return [x.numpy() for _ in range(2) for x,_ in dls.train]
    aug = paper_augment(96, seed=5)
    a,b,c,d = epochs(make(aug)),epochs(make(aug)),epochs(make(aug, 2)),epochs(make(paper_augment(96, seed=6)))
    assert all((x==y).all() for x,y in zip(a,b)) and all((x==y).all() for x,y in zip(a,c))
    assert not (a[0]==d[0]).all() and not (a[0]==a[2]).all()
    v,w = ([(x.numpy(),y.numpy()) for x,y in make(t).valid] for t in (aug,()))
    assert all((x1==x2).all() and (y1==y2).all() for (x1,y1),(x2,y2) in zip(v,w)) and v[0][0].shape[-1]==96

def test_blur_is_scipys(rng):
    x,sigma = rng.normal(size=(4,2,50,60)).astype(np.float32),rng.uniform(.3, 2.5, 4)
    got = gaussian_blur(torch.from_numpy(x), torch.from_numpy(sigma).float(), 10).numpy()
    for o,g,s in zip(x, got, sigma): np.testing.assert_allclose(g, np.stack([gaussian_filter(c, s, mode='nearest', radius=10) for c in o]), atol=1e-5)

def test_optics_do_what_they_say(rng):
    x,seed = TensorImage(torch.from_numpy(rng.normal(size=(500,1,24,24))).float()),int(rng.integers(1e9))
    y = TensorMask(torch.ones(500,24,24))
    run = lambda **k: RandomOptics(**(dict(blur=0, contrast=0, brightness=0, noise=0)|k), seed=seed)((x,y), split_idx=0)
    assert all((run(**{k:.5})[1]==y).all() for k in ('blur','contrast','brightness','noise'))
    add = (run(brightness=.3)[0]-x).flatten(1); assert add.std(1).max()<1e-5 and add[:,0].min()<-.25 and .25<add[:,0].max()<=.3
    gain = (run(contrast=.5)[0]/x).flatten(1).median(1)[0]; assert 1/1.5-1e-4<gain.min()<.75 and 1.4<gain.max()<=1.5+1e-4
    std = (run(noise=.4)[0]-x).flatten(1).std(1); assert std.min()<.05 and .33<std.max()<.45

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_same_on_gpu(rng):
    img,lbl = rng.normal(size=(12,1,314,314)).astype(np.float32),np.stack([blobs(rng, (314,314)) for _ in range(12)])
    (x,y),(xg,yg) = (RandomWarp(seed=3)(tuple(o.to(d) for o in tensors(img,lbl)), split_idx=0) for d in ('cpu','cuda'))
    assert xg.device.type=='cuda' and (x-xg.cpu()).abs().max()<1e-3 and (y==yg.cpu()).float().mean()>.9999

@pytest.mark.parametrize('make,says', [(lambda: paper_augment(0),'size is 0'), (lambda: paper_augment(shift=-1),'shift is -1'), (lambda: paper_augment(sigma=-2),'sigma is -2'),
    (lambda: paper_augment(sigma=float('nan')),'sigma is nan'), (lambda: paper_augment(mesh=0),'mesh is 0'), (lambda: RandomOptics(blur=-1),'blur is -1'),
    (lambda: bspline_displacement(torch.zeros(1,2,3,5), 9),'(1, 2, 3, 5)')])
def test_bad_input(make, says):
    with pytest.raises(CellsegError) as e: make()
    assert says in str(e.value)

def test_two_margins_are_refused(coordinates):
    with pytest.raises(CellsegError, match='both need a margin'): patch_dls(coordinates, size=96, inputs=('row','col'), batch_tfms=[paper_augment(96)]*2)
