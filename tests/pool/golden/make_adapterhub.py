"""Write the folders beside this file, with the real `adapters` library. Run by hand, never by the tests.

Needs an environment of its own, since `adapters` pins an older transformers: adapters==1.3.0, transformers==4.57.6.
Each folder is what `save_adapter(..., use_safetensors=True)` wrote; `recorded.safetensors` holds the base model's
state, an input and the model's output with the adapter.
"""

from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, DistilBertConfig, DistilBertModel

HERE = Path(__file__).parent
BERT = BertConfig(
    hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20,
    max_position_embeddings=16,
)  # fmt: skip
DISTILBERT = DistilBertConfig(dim=8, n_layers=2, n_heads=2, hidden_dim=16, vocab_size=20, max_position_embeddings=16)
PLAIN = {"mh_adapter": False, "output_adapter": True, "reduction_factor": 4}


def write(folder, model, config):
    adapters.init(model)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.add_adapter("news", config=config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters.news." in name:
                parameter.normal_(std=0.5)
    model.save_adapter(str(HERE / folder), "news", use_safetensors=True, with_head=False)
    model.set_active_adapters("news")
    model.eval()
    tokens = torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        output = model(input_ids=tokens)[0]
    recorded = {f"base.{name}": tensor.contiguous() for name, tensor in base.items() if "token_type_ids" not in name}
    save_file({**recorded, "input": tokens, "output": output}, str(HERE / folder / "recorded.safetensors"))


torch.manual_seed(0)
write("adapterhub_seq_bn", BertForSequenceClassification(BERT), adapters.SeqBnConfig(reduction_factor=4))
write("adapterhub_bert", BertModel(BERT), adapters.BnConfig(**PLAIN, non_linearity="swish", scaling=2.0))
write(
    "adapterhub_distilbert",
    DistilBertModel(DISTILBERT),
    adapters.BnConfig(**PLAIN, non_linearity="gelu", scaling="learned"),
)
