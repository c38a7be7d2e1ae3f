// variants: sm80
// Attention over f16 keys and values, of 1 to 8 rows at once. See attend.cuh.
#include "attend.cuh"

ATTEND(attend_f16_1, 1, 1)
ATTEND(attend_f16_4, 1, 4)
ATTEND(attend_f16_8, 1, 8)
