"""Milliseconds to augment a batch of 12 images with labels at 224 px: python tests/benchmarks/augment.py [repeats]

All draw new deformations, read an image linearly and its label by nearest neighbour, and give 224 px. Ours turns and flips too, and is fed 314 px, its margin included; SimpleITK gets the same pixels."""
import os,sys,time
import numpy as np, torch
from statistics import median
import SimpleITK as sitk
from fastai.torch_core import TensorImage,TensorMask
from cellseg.augment import paper_augment

try: from monai.transforms import Rand2DElasticd
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
    aug = Rand2DElasticd(['image','label'], spacing=(SIZE//2,)*2, magnitude_range=(SIGMA,SIGMA), prob=1, mode=['bilinear','nearest'], padding_mode='border')
    m = (imgs.shape[-1]-SIZE)//2
    items = [dict(image=torch.from_numpy(i[None,m:-m,m:-m].copy()), label=torch.from_numpy(l[None,m:-m,m:-m].copy())) for i,l in zip(imgs,lbls)]
    def run():
        out = [aug(d) for d in items]
        return [torch.stack([o[k] for o in out]) for k in ('image','label')]
    return run

def compare(threads, repeats):
    "Milliseconds of each, in turns, so that a busy moment of the machine meets all"
    torch.set_num_threads(threads); sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
    rng = np.random.default_rng(0)
    imgs,lbls = rng.normal(size=(N,SIZE+90,SIZE+90)).astype(np.float32),rng.integers(0, 3, (N,SIZE+90,SIZE+90), dtype=np.uint8)
    fs = dict(cellseg=ours(imgs, lbls), SimpleITK=simpleitk(imgs, lbls)) | (dict(MONAI=monai(imgs, lbls)) if Rand2DElasticd else {})
    took = {k:[] for k in fs}
    for r in range(repeats+3): # 3 to warm up
        for k,f in fs.items():
            start = time.perf_counter(); x,y = f(); took[k].append(1000*(time.perf_counter()-start))
            assert x.shape[-2:]==y.shape[-2:]==(SIZE,SIZE) and len(x)==len(y)==N
    return {k:median(v[3:]) for k,v in took.items()}

if __name__=='__main__':
    repeats = max(20, int(sys.argv[1])) if len(sys.argv)>1 else 25
    if Rand2DElasticd is None: print('MONAI is not installed (pip install monai): left out')
    for threads in (1,2):
        ms = compare(threads, repeats)
        for k,v in ms.items(): print(f'{threads} thread{"s"*(threads>1)}: {k:9} {v:7.2f} ms a batch of {N}' + (f'; cellseg is {v/ms["cellseg"]:.1f} times as fast (wanted: 20)' if k!='cellseg' else ''))
    print(f'median of {repeats}; load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
