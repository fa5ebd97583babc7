"""Train a lossless byte-level BPE with XLNet's special ids on JSON lines or raw text.

python scripts/train_tokenizer.py --data_file '$ASARM_DATA_DIR/train/english-simple.jsonl.gz' --vocab_size 8192
--output_dir runs/tokenizer
"""

from pathlib import Path

from jsonargparse import CLI

from asarm.data.sources import read_documents
from asarm.tokenizer import TextTokenizer, train_byte_level_bpe


def main(data_file: str, output_dir: str, vocab_size: int = 8192, sources: list[str] | None = None) -> None:
    """Write OUTPUT_DIR/tokenizer.json and tokenizer_config.json.

    Args:
        data_file: training text.
        output_dir: folder for them.
        vocab_size: number of pieces, the nine special tokens and 256 bytes included.
        sources: only documents whose source starts with one of these.
    """
    documents = read_documents(data_file)
    texts = [d.text for d in documents if not sources or d.source.startswith(tuple(sources))]
    tokenizer = TextTokenizer(train_byte_level_bpe(texts, vocab_size))
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(output_dir)
    print(f"{len(tokenizer)} pieces from {len(texts)} documents in {output_dir}/tokenizer.json")


if __name__ == "__main__":
    CLI(main, as_positional=False)
