// variants: sm80
// Attention over f32 keys and values, of 1 to 8 rows at once. See attend.cuh.
#include "attend.cuh"

ATTEND(attend_f32_1, 0, 1)
ATTEND(attend_f32_8, 0, 8)
