"""Model families of other libraries, unmodified, in tiny configurations; their dropout is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_dp as ldp
from tests.bookkeeping.oracle import Batch, Case
from tests.bookkeeping.other_families import OTHER_FAMILIES
from tests.bookkeeping.recurrent_cases import Tagger

B = 4
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = {**SMALL, "num_key_value_heads": 1}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
GPT2_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
BART = {"vocab_size": 50, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0}
DISTIL = {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}


def text() -> Batch:
    """Return token ids and labels."""
    return {"ids": torch.randint(5, 50, (B, 7)), "y": torch.randint(0, 2, (B,))}


def images(size: int) -> Callable[[], Batch]:
    """Return images and labels."""
    return lambda: {"x": torch.randn(B, 3, size, size), "y": torch.randint(0, 5, (B,))}


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a causal language model; all sequences have one length, so the mean is one over samples."""
    logits = model(input_ids=batch["ids"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["ids"][:, 1:].flatten())


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss that an encoder-decoder computes itself."""
    return model(input_ids=batch["ids"], labels=batch["ids"]).loss


def label(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a text classifier."""
    return F.cross_entropy(model(input_ids=batch["ids"]).logits, batch["y"])


def picture(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of an image classifier."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def no_dropout(model: nn.Module) -> nn.Module:
    """Switch off every dropout and stochastic depth."""
    for module in model.modules():
        for name in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def transformer(kind: str, config: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    """Return the recipe of a model of the transformers library."""

    def build() -> nn.Module:
        library = pytest.importorskip("transformers")
        return no_dropout(getattr(library, kind)(getattr(library, config)(**options)))

    return build


def adapted(build: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    """Return the recipe of a model with low-rank adapters."""

    def with_adapters() -> nn.Module:
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(build(), peft.LoraConfig(r=4, **options))

    return with_adapters


def image_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """Return the recipe of a model of the timm library."""
    return lambda: no_dropout(pytest.importorskip("timm").create_model(name, num_classes=5, **options))


def torchvision_model(build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    """Return the recipe of a model of the torchvision library."""
    return lambda: no_dropout(build(pytest.importorskip("torchvision.models")))


def mixer() -> nn.Module:
    """Return an MLP-Mixer, which mixes the positions with the transpose of its input."""
    library = pytest.importorskip("timm.models.mlp_mixer")
    return library.MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)


def groups(channels: int, **_: Any) -> nn.Module:
    """Return a normalisation in the place of batch normalisation."""
    return nn.GroupNorm(4 if channels % 4 == 0 else 1, channels)


def sounds(*shape: int) -> Callable[[], Batch]:
    """Return recordings or their spectra, labels and a transcription."""
    return lambda: {
        "x": torch.randn(B, *shape),
        "y": torch.randint(0, 2, (B,)),
        "ids": torch.randint(5, 50, (B, 6)),
    }


def heard(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a classifier of recordings."""
    return F.cross_entropy(model(batch["x"]).logits, batch["y"])


def transcribed(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a transcription, which a speech model computes itself."""
    return model(input_features=batch["x"], labels=batch["ids"]).loss


def ragged_text() -> Batch:
    """Return token ids, how many of them count, and a tag for each."""
    ids = torch.randint(0, 7, (B, 6))
    return {"ids": ids, "length": torch.tensor([3, 6, 1, 4]), "y": (ids + ids.roll(1, 1)) % 5}


def tagged(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of a tagger of sequences of different lengths."""
    loss = F.cross_entropy(model(batch["ids"], batch["length"]).mT, batch["y"], reduction="none")
    return ldp.per_sample_mean(loss, torch.arange(loss.shape[1]) < batch["length"][:, None])


WAV2VEC2 = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WAV2VEC2 |= {"intermediate_size": 24, "conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (4, 4)}
WAV2VEC2 |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAV2VEC2 |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "mask_time_prob": 0.0}
NO_WAV2VEC2_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
NO_WAV2VEC2_DROPOUT |= {"feat_proj_dropout": 0.0, "final_dropout": 0.0}
WHISPER = {"vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "num_mel_bins": 8}
WHISPER |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
WHISPER |= {"max_source_positions": 20, "max_target_positions": 10, "dropout": 0.0}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
TINY_VIT = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
FAMILIES = [
    Case("GPT-2", transformer("GPT2LMHeadModel", "GPT2Config", {**GPT2, **GPT2_NO_DROPOUT}), text, next_token),
    Case("BERT", transformer("BertForSequenceClassification", "BertConfig", {**SMALL, **NO_DROPOUT}), text, label),
    Case(
        "RoBERTa",
        transformer("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, **NO_DROPOUT, "pad_token_id": 1}),
        text,
        label,
    ),
    Case("Llama", transformer("LlamaForCausalLM", "LlamaConfig", LLAMA), text, next_token),
    Case("Mistral", transformer("MistralForCausalLM", "MistralConfig", LLAMA), text, next_token),
    Case("Qwen3", transformer("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 8}), text, next_token),
    Case(
        "Mamba",
        transformer(
            "MambaForCausalLM",
            "MambaConfig",
            {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        ),
        text,
        next_token,
    ),
    Case(
        "LoRA",
        adapted(
            transformer("GPT2LMHeadModel", "GPT2Config", {**GPT2, **GPT2_NO_DROPOUT}),
            target_modules=["c_attn"],
            fan_in_fan_out=True,
        ),
        text,
        next_token,
    ),
    Case(
        "LoRA-BERT",
        adapted(
            transformer("BertForSequenceClassification", "BertConfig", {**SMALL, **NO_DROPOUT}),
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
            bias="lora_only",
        ),
        text,
        label,
    ),
    Case(
        "DoRA-Llama",
        adapted(
            transformer("LlamaForCausalLM", "LlamaConfig", LLAMA),
            target_modules=["q_proj", "v_proj", "embed_tokens"],
            use_dora=True,
        ),
        text,
        next_token,
    ),
    Case("DistilBERT", transformer("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL), text, label),
    Case(
        "ALBERT",
        transformer("AlbertForSequenceClassification", "AlbertConfig", {**SMALL, **NO_DROPOUT, "embedding_size": 8}),
        text,
        label,
    ),
    Case(
        "DeBERTa-v2",
        transformer(
            "DebertaV2ForSequenceClassification",
            "DebertaV2Config",
            {**SMALL, **NO_DROPOUT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_dropout": 0.0},
        ),
        text,
        label,
    ),
    Case(
        "T5", transformer("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}), text, own_loss
    ),
    Case("BART", transformer("BartForConditionalGeneration", "BartConfig", BART), text, own_loss),
    Case("ViT", image_model("vit_tiny_patch16_224", **TINY_VIT), images(32), picture),
    Case("DeiT", image_model("deit_tiny_distilled_patch16_224", **TINY_VIT), images(32), picture),
    Case("BEiT", image_model("beit_base_patch16_224", **TINY_VIT), images(32), picture),
    Case(
        "Swin",
        image_model("swin_tiny_patch4_window7_224", img_size=56, embed_dim=8, depths=(2, 1), num_heads=(2, 2)),
        images(56),
        picture,
    ),
    Case("MLP-Mixer", mixer, images(32), picture),
    Case("ConvNeXt", image_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16)), images(32), picture),
    Case(
        "EfficientNet",
        image_model("efficientnet_lite0", norm_layer=groups, act_layer=nn.SiLU),
        images(32),
        picture,
        slow=True,
    ),
    Case(
        "ResNet-18",
        torchvision_model(lambda tv: tv.resnet18(num_classes=5, norm_layer=groups)),
        images(32),
        picture,
        slow=True,
    ),
    Case(
        "Wav2Vec2",
        transformer("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", {**WAV2VEC2, **NO_WAV2VEC2_DROPOUT}),
        sounds(400),
        heard,
    ),
    Case(
        "Whisper", transformer("WhisperForConditionalGeneration", "WhisperConfig", WHISPER), sounds(8, 40), transcribed
    ),
    Case("LSTM-tagger", lambda: Tagger(num_layers=2), ragged_text, tagged),
    Case(
        "weight-norm",
        lambda: nn.Sequential(
            nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(192, 8)), nn.Tanh(), nn.Linear(8, 5)
        ),
        images(8),
        picture,
    ),
    Case(
        "torchvision-ViT",
        torchvision_model(lambda tv: tv.VisionTransformer(32, 8, 2, 2, 16, 24, num_classes=5)),
        images(32),
        picture,
    ),
    *OTHER_FAMILIES,
]
