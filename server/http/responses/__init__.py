"""POST /v1/responses: OpenAI's newer form, text, nothing kept."""
