# Installs BUILD into WORK/prefix, builds SOURCE against it in WORK/build, runs the results over 2 ranks.
file(REMOVE_RECURSE ${WORK}/prefix ${WORK}/build)
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}: ${result}\n${output}")
  endif()
endfunction()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${WORK}/prefix)
run(${CMAKE_COMMAND} -G Ninja -S ${SOURCE} -B ${WORK}/build -DCMAKE_PREFIX_PATH=${WORK}/prefix
  -DLIBTORCH_ROOT=${LIBTORCH_ROOT} -DCMAKE_BUILD_TYPE=Release)
run(${CMAKE_COMMAND} --build ${WORK}/build)
run(${WORK}/build/custom_loop 2)
run(${WORK}/build/torch_optimizer 2)
