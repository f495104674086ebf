"What tests share: a source of fresh random numbers whose seed is shown when a test fails, and the real images if they are there"
from pathlib import Path
import numpy as np
import pytest

DATA = Path(__file__).parents[2]/'shared'/'data'

@pytest.fixture
def rng(record_property):
    seed = np.random.SeedSequence().entropy
    record_property('seed', seed); print('seed', seed)
    return np.random.default_rng(seed)

@pytest.fixture
def data():
    if not DATA.is_dir(): pytest.skip(f'no real images in {DATA.parent.name}/{DATA.name} beside the repository')
    return DATA

@pytest.fixture
def cellseg(capsys):
    "Run a command line in this process; gives exit code, output, errors"
    from cellseg.cli import main
    def run(*args):
        try: code = main([str(a) for a in args])
        except SystemExit as e: code = e.code
        out,err = capsys.readouterr()
        return code,out,err
    return run

def pytest_collection_modifyitems(items):
    "The longest files first: two workers then end at about the same time"
    items.sort(key=lambda i: i.path.name not in ('test_cli.py','test_real_data.py'))
