"""Helpers of the fault suite: processes that may be killed, and what they do."""
