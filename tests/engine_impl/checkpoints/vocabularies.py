"""A small corpus of all that is hard, and tiny SentencePiece models of it."""

import io

import sentencepiece

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It was the best of times, it was the worst of times.",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Es war einmal ein König, der hatte drei Töchter; naïve café, Ærøskøbing, Łódź.",
    "東京は日本の首都です。北京是中国的首都。서울은 대한민국의 수도이다.",
    "Семь раз отмерь, один раз отрежь. Съешь же ещё этих мягких французских булок.",
    "🥚🐣🐥 👩‍👩‍👧‍👦 🇫🇷 ✨ 1,234.56 ½ № ① ﬁ",
    '{"key": ["value", 1.5e-3, null], "другой": "価値"}',
]


def train_pieces(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 3), model_writer=model, minloglevel=2, num_threads=1, **options
    )
    return model.getvalue()
