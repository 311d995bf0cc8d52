"""Files that others publish, read without running any of the code that pickles may hold."""

from ctm_fast.models.published.files import OPENAI, PublishedFile, read_published, read_state_dict

__all__ = ["OPENAI", "PublishedFile", "read_published", "read_state_dict"]
