"""Small networks on the features between a backbone's layers."""

from .uem import FORMS, MeanCertainty, UEMHeads, infer_form

__all__ = ["FORMS", "MeanCertainty", "UEMHeads", "infer_form"]
