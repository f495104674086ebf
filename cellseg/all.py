"Everything, for notebooks: `from cellseg.all import *`"
from pathlib import Path
import numpy as np, pandas as pd, torch
import matplotlib.pyplot as plt
from .core import *
from .io import *
from .fields import *
from .simulate import *
from .labels import *
from .sampling import *
from .augment import *
from .data import *
from .models.blocks import *
from .models.registry import *
from .models.unet import *
from .models.tiramisu import *
from .models.deeplab import *
from .models.pretrained import *
from .metrics import *
from .learner import *
from .distributed import *
from .predict import *
from .workers import *
from .run import *
from .crossval import *
from .plot import *
from .report import *
