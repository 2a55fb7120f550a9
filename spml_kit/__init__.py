__version__ = "0.2.0"

import warnings

warnings.filterwarnings('ignore', '`torch.jit.script` is deprecated') # said by torch when fastai is imported
