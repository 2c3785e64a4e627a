"""`python -m lora_sentiment VERB` is `lora-sentiment VERB`."""

from lora_sentiment.cli import main

if __name__ == "__main__":
    main()
