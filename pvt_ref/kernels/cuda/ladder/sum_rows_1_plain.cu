// The sum over rows (layers/sum_rows.py), y_j = sum_r x_rj, first version: a thread adds up a
// column.
//
// The threads of a warp have neighbouring columns, so all bytes that a read fetches are used. But
// there are only as many threads as columns, and each waits for memory once for every row.

extern "C" __global__ void sum_rows_1(const float *x, int rows, int columns, float *y)
{
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    double total = 0;
    for (int row = 0; row < rows; row++) total += x[(size_t)row * columns + column];
    y[column] = (float)total;
}
