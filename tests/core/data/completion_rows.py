"""Rows with graded completions, and the fields that read them."""

GRADED = {"completion_fields": ("a", "b"), "completion_reward_field": "grade"}
BARE = {"completion_fields": ("a", "b")}
ASK = {"role": "user", "content": "Question 0?"}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text):
    return {"role": "assistant", "content": text}


def good(text, grade=1):
    return {"text": text, "grade": grade}
