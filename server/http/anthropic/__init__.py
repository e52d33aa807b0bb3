"""POST /v1/messages: conversations in Anthropic's form, text."""
