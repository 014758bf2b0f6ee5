"""A tokenizer of bytes in a folder, as transformers saves one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors


def save_byte_tokenizer(transformers, folder):
    """Ids: 0 `<pad>`, 1 `<s>`, which begins a text, then one for each byte."""
    names = ["<pad>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>")
    saved.save_pretrained(folder)
