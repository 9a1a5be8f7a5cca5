"""Exercise, steps 2 to 4: the shift, the MimIC head, the alignment loss. Guidance: step_2.md, step_3.md, step_4.md.

    pytest tests/test_2* --of exercises

The paper's equations, in the letters of step 1; L layers, d hidden size; `v` is the values, the paper's bold v is `vector`.
"""

import torch  # noqa: F401 (for you to use)

from model import attention  # noqa: F401 (that of step 1: ours, until you come back with your own)


# ---- step 2 ---------------------------------------------------------------------------------------------------------
def mixing_weight(log_z1, log_z2):
    """μ = Z1 / (Z1 + Z2), in (0,1): never overflows. Same shapes in and out.

    A row without keys (log Z2 = −inf) gives 1, or 0 if it has no demonstration either (both −inf)."""
    raise NotImplementedError("step 2: divide Z1/(Z1+Z2) by Z1: it is the sigmoid of a difference. Mind −inf − −inf")


def icl_attention(q, k_D, v_D, k, v, mask_D=None, mask=None):
    """Attention over [K_D;K] from the attentions over K_D and over K.

    q (B,H,T,D); k_D, v_D (B,Hkv,S_D,D); k, v (B,Hkv,S,D); masks (B,1,T,S_D) and (B,1,T,S) bool.
    → out (B,H,T,D) = SA + μ·shift, mu (B,H,T,1), shift (B,H,T,D) = SA_D − SA."""
    raise NotImplementedError("step 2: two calls of attention give SA_D, log Z1 and SA, log Z2; then mixing_weight")


# ---- step 3 ---------------------------------------------------------------------------------------------------------
class MimIC:
    """Three methods of `mimic.MimIC`. Its parameters are there: self.vector (L,H,D), self.f_weight (L,H,D), self.f_bias (L,H);
    so are its options: self.z2, "masked" or "unmasked", and self.mu_of, "head", "layer" or "one"."""

    def f(self, layer, q):
        """f(q) = f_weight·q + f_bias of every head.  q (B,H,T,D) → (B,H,T)."""
        raise NotImplementedError("step 3: a dot product over D with every head's own weight: torch.einsum")

    def mu(self, layer, q, k, lse):
        """μ̃ = e^f / (e^f + Z2), (B,H,T).  lse (B,H,T) = log Z2 of the attention itself.

        mu_of "one": 1 everywhere. z2 "unmasked": log Z2 over all keys k (B,Hkv,S,D), no mask, as the official code has it.
        mu_of "layer": one μ̃ for all heads, of the sum of their f and the mean of their log Z2."""
        raise NotImplementedError("step 3: mixing_weight with f in the place of log Z1")

    def after_attention(self, layer, q, k, out, lse):
        """SA(q,K,V) + μ̃·v.  out (B,H,T,D) → (B,H,T,D)."""
        raise NotImplementedError("step 3: every head's own vector, times its μ̃ at every token, added to out (in out's dtype)")


# ---- step 4 ---------------------------------------------------------------------------------------------------------
def align_loss(student, teacher, mask, norm=False):
    """L_align, a scalar in fp32.  student, teacher: one (B,T,d) tensor a layer; mask (B,T) bool, True = kept token.

    Squared difference: the mean over the layers, kept tokens and d of a sample, then over samples. norm=True divides a sample's
    error in a layer by the mean square of the teacher's states there. Other tokens do not count, even if they hold nan."""
    raise NotImplementedError("step 4: a mean for every sample first: a sample counts the same beside a longer one")
