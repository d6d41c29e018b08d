"""What takes seconds to import, for killed.py's server; in its children no collection goes through it."""

from tests.helpers import cheap

with cheap.imports():
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer  # noqa: F401
    from trl import SFTConfig, SFTTrainer  # noqa: F401

    import fast_ft.cli.main
    import fast_ft.pipeline.run  # noqa: F401
