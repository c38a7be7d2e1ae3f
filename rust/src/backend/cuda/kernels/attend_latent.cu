// variants: sm80
// Latent attention over keys of each type. See attend.cuh.
#include "attend.cuh"

ATTEND_OF(attend_latent_f32, 0, 4, MAX_KEY)
ATTEND_OF(attend_latent_f16, 1, 4, MAX_KEY)
ATTEND_OF(attend_latent_i8, 2, 4, MAX_KEY)
