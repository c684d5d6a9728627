"""The public names of clip_jax, and where they are defined."""

from .api import convert_model as convert_model
from .api import create_model as create_model
from .api import evaluate_model as evaluate_model
from .api import export_model as export_model
from .api import open_data as open_data
from .api import start_processes as start_processes
from .api import train_model as train_model
from .checkpoints.manager import Checkpoints as Checkpoints
from .config import Config as Config
from .config_files import load_config as load_config
from .data.tokenizers.clip_bpe import tokenize as tokenize
from .errors import InputError as InputError
from .inference.loading import Model as Model
from .inference.loading import load as load
from .inference.loading import load_on_mesh as load_on_mesh
from .losses import SigmoidConfig as SigmoidConfig
from .losses import SoftmaxConfig as SoftmaxConfig
from .losses.contrastive import contrastive_loss as contrastive_loss
from .models.clip import CLIP as CLIP
from .models.clip import CLIPConfig as CLIPConfig
from .models.zoo import available_models as available_models
from .processes import catch_sigterm as catch_sigterm
from .sharding import MeshConfig as MeshConfig
from .sharding import make_mesh as make_mesh
from .step import Program as Program

__all__: list[str]
__version__: str
