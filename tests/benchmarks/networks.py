"""Training step of each network: patches/s, ratio to the plain form (float32, contiguous), peak memory.

python tests/benchmarks/networks.py [--networks unet tiramisu deeplabv3plus] [--batch 8] [--size 224] [--steps 5] [--forms plain channels_last bf16 both compiled] [--csv FILE]

Runs unchanged on a GPU. Each form of a network runs in a process of its own, so that memory is its own peak.
"""
import argparse, csv, json, platform, subprocess, sys, time

def step_times(name, form, batch, size, steps, device, checkpoint=False):
    "Median seconds of a training step, and peak memory in GB"
    import resource, statistics, torch
    import cellseg.models.unet, cellseg.models.tiramisu, cellseg.models.deeplab
    from cellseg.core import seeded
    from cellseg.models.registry import create_model
    with seeded(0): model = create_model(name, **(dict(checkpoint=True) if checkpoint else {})).to(device).train()
    x,y = torch.randn(batch, 1, size, size, device=device),torch.randint(0, 3, (batch,size,size), device=device)
    if form in ('channels_last','both','compiled'): model,x = model.to(memory_format=torch.channels_last),x.to(memory_format=torch.channels_last)
    run = torch.compile(model) if form=='compiled' else model
    opt = torch.optim.Adam(model.parameters(), fused=device in ('cpu','cuda'))
    sync = torch.cuda.synchronize if device=='cuda' else lambda: None
    def peak(): return torch.cuda.max_memory_allocated()/1e9 if device=='cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
    start,times = peak(),[]
    for i in range(steps+2): # the first two warm up (and compile)
        sync(); t = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=form in ('bf16','both','compiled')): out = run(x)
        torch.nn.functional.cross_entropy(out.float(), y).backward()
        opt.step(); opt.zero_grad()
        sync(); times.append(time.perf_counter()-t)
    return statistics.median(times[2:]),peak()-start

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--networks', nargs='+', default=['unet','tiramisu','deeplabv3plus']); p.add_argument('--batch', type=int, nargs='+', default=[8])
    p.add_argument('--size', type=int, default=224); p.add_argument('--steps', type=int, default=5); p.add_argument('--csv')
    p.add_argument('--forms', nargs='+', default=['plain','channels_last','bf16','both']); p.add_argument('--one', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: print(json.dumps(step_times(**json.loads(args.one)))); return
    import torch
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    machine = torch.cuda.get_device_name(0) if device=='cuda' else f'{platform.machine()}, {torch.get_num_threads()} threads'
    print(f'{machine}, torch {torch.__version__}, {args.size} px; median of {args.steps} steps')
    rows = []
    for name in args.networks:
        for batch in args.batch:
            for form,ckpt in [(f,False) for f in args.forms]+[('both',True)]*(name=='tiramisu'):
                one = json.dumps(dict(name=name, form=form, batch=batch, size=args.size, steps=args.steps, device=device, checkpoint=ckpt))
                r = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--one', one], capture_output=True, text=True)
                if r.returncode: print(f'{name} {form}: {r.stderr.strip().splitlines()[-1]}'); continue
                seconds,memory = json.loads(r.stdout)
                rows.append(dict(network=name, form=form+(', checkpointed' if ckpt else ''), batch=batch, patches_per_s=round(batch/seconds, 2), memory_gb=round(memory, 2),
                    ratio=round(next((o['patches_per_s'] for o in rows if o['network']==name and o['batch']==batch and o['form']=='plain'), batch/seconds)**-1*batch/seconds, 2), machine=machine))
                print('  '.join(f'{k} {v}' for k,v in rows[-1].items() if k!='machine'), flush=True)
    if args.csv:
        with open(args.csv, 'w', newline='') as f: w = csv.DictWriter(f, rows[0]); w.writeheader(); w.writerows(rows)

if __name__=='__main__': main()
