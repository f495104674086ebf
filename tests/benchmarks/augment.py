"""Milliseconds to augment a batch of 12 images with labels at 224 px: python tests/benchmarks/augment.py [turns]

All draw new deformations, read an image linearly and its label by nearest neighbour, and give 224 px. Ours turns and flips too, and is fed 314 px, its margin included; SimpleITK gets the same pixels."""
import sys
import numpy as np, torch
import SimpleITK as sitk
from fastai.torch_core import TensorImage,TensorMask
from cellseg.augment import paper_augment
from common import in_turns,load,machine,row,show

try:
    from monai.data import set_track_meta
    from monai.transforms import Rand2DElasticd
except ImportError: Rand2DElasticd = None

SIZE,N,SIGMA = 224,12,15

def ours(imgs, lbls):
    aug = paper_augment(SIZE)
    batch = TensorImage(torch.from_numpy(imgs[:,None])),TensorMask(torch.from_numpy(lbls))
    return lambda: aug(batch, split_idx=0)

def simpleitk(imgs, lbls):
    m,rng = (imgs.shape[-1]-SIZE)//2,np.random.default_rng(0)
    def one(img, lbl):
        t = sitk.BSplineTransform(2, 3)
        t.SetTransformDomainOrigin([m-.5]*2); t.SetTransformDomainPhysicalDimensions([SIZE]*2); t.SetTransformDomainMeshSize([2,2])
        t.SetParameters(rng.normal(0, SIGMA, 50).tolist())
        grid = [m]*2,[1.]*2,[1.,0.,0.,1.],0
        return [sitk.GetArrayFromImage(sitk.Resample(sitk.GetImageFromArray(a), [SIZE]*2, t, how, *grid)) for a,how in ((img,sitk.sitkLinear),(lbl,sitk.sitkNearestNeighbor))]
    return lambda: [np.stack(o) for o in zip(*[one(i,l) for i,l in zip(imgs,lbls)])]

def monai(imgs, lbls):
    set_track_meta(False) # faster
    aug = Rand2DElasticd(['image','label'], spacing=(SIZE//2,)*2, magnitude_range=(SIGMA,SIGMA), prob=1, mode=['bilinear','nearest'], padding_mode='border')
    m = (imgs.shape[-1]-SIZE)//2
    items = [dict(image=torch.from_numpy(i[None,m:-m,m:-m].copy()), label=torch.from_numpy(l[None,m:-m,m:-m].copy())) for i,l in zip(imgs,lbls)]
    def run():
        out = [aug(d) for d in items]
        return [torch.stack([o[k] for o in out]) for k in ('image','label')]
    return run

def compare(threads, turns):
    "Milliseconds a batch of each, on so many threads"
    before = torch.get_num_threads()
    torch.set_num_threads(threads); sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    rng = np.random.default_rng(0)
    imgs,lbls = rng.normal(size=(N,SIZE+90,SIZE+90)).astype(np.float32),rng.integers(0, 3, (N,SIZE+90,SIZE+90), dtype=np.uint8)
    fs = dict(ours=ours(imgs, lbls), SimpleITK=simpleitk(imgs, lbls)) | (dict(MONAI=monai(imgs, lbls)) if Rand2DElasticd else {})
    for f in fs.values(): x,y = f(); assert x.shape[-2:]==y.shape[-2:]==(SIZE,SIZE) and len(x)==len(y)==N
    ms = {k:1e3*t for k,t in in_turns(fs, turns).items()}
    torch.set_num_threads(before)
    return ms

def rows(turns=25):
    out = []
    for threads in (1,2):
        ms = compare(threads, turns)
        out += [row(f'augment a batch of {N}, {threads} thread{"s"*(threads>1)}; {k}', ms['ours'], v, 'ms', v/ms['ours'], '>= 20') for k,v in ms.items() if k!='ours']
    return out

if __name__=='__main__':
    if Rand2DElasticd is None: print('MONAI is not installed (pip install monai): left out')
    show(rows(int(sys.argv[1]) if len(sys.argv)>1 else 25)); print(f'{machine()}; {load()}')
