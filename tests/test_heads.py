"""MeanPooledClassifier inside PEFT and transformers."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

from peft_xmask.integrations.pooled_classifier import MeanPooledClassifier, mean_pool

SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.arange(1, 13).view(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def small_classifier() -> MeanPooledClassifier:
    torch.manual_seed(0)
    return MeanPooledClassifier(BertModel(BertConfig(**SHAPE)), 3).eval()


def test_padding_does_not_count():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    assert mean_pool(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 4.0]]
    model = small_classifier()
    alone = model(input_ids=IDS[1:, :3], attention_mask=MASK[1:, :3]).logits
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=MASK).logits[1:], alone)


def test_loss_is_the_cross_entropy_and_embeddings_may_be_given():
    model = small_classifier()
    labels = torch.tensor([2, 0])
    output = model(input_ids=IDS, attention_mask=MASK, labels=labels)
    chosen = output.logits.log_softmax(-1)[torch.arange(2), labels]
    torch.testing.assert_close(output.loss, -chosen.mean())
    embeddings = model.get_input_embeddings()(IDS)
    assert torch.equal(model(inputs_embeds=embeddings, attention_mask=MASK).logits, output.logits)


def test_a_decoder_serves_too():
    model = MeanPooledClassifier(LlamaModel(LlamaConfig(**SHAPE)), 4).eval()
    assert model(input_ids=IDS, attention_mask=MASK).logits.shape == (2, 4)


def test_the_backbone_keeps_its_weights_and_its_config():
    backbone = BertModel(BertConfig(**SHAPE, num_labels=7))
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = MeanPooledClassifier(backbone, 3)
    assert model.backbone is backbone
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert (backbone.config.num_labels, model.config.num_labels) == (7, 3)


def test_peft_trains_and_saves_the_head_and_both_doors_load_it(tmp_path):
    model = get_peft_model(small_classifier(), LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    assert model.base_model.model.classifier.weight.requires_grad
    with torch.no_grad():
        model.base_model.model.classifier.weight.add_(1.0)
    expected = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    model.save_pretrained(tmp_path)
    through_peft = PeftModel.from_pretrained(small_classifier(), tmp_path).eval()
    assert torch.equal(through_peft(input_ids=IDS, attention_mask=MASK).logits, expected)
    through_transformers = small_classifier()
    through_transformers.load_adapter(str(tmp_path))
    assert torch.equal(through_transformers.eval()(input_ids=IDS, attention_mask=MASK).logits, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(small_classifier(), LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
        torch.manual_seed(1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(input_ids=IDS, attention_mask=MASK, labels=torch.tensor([0, 1])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_one_class_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        MeanPooledClassifier(BertModel(BertConfig(**SHAPE)), 1)
