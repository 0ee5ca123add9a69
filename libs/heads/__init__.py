"""Small networks on the features between a backbone's layers."""

from .uem import FORMS, UEMHeads, infer_form

__all__ = ["FORMS", "UEMHeads", "infer_form"]
